"""WebVision 1.0: 2.4 million images that Google and Flickr returned for 1,631 queries, in ImageNet's 1,000 classes.

W. Li et al., "WebVision Database: Visual Learning and Understanding from Web Data", arXiv:1708.02862, 2017. The labels
are those of the queries, so many are wrong. Validation, 50 images of each class, was labelled by people. The layout:

    info/train_filelist_{google,flickr,all}.txt     lines `path label`, labels from 0; data.origin selects one
    info/val_filelist.txt                           lines `file label`, files in val_images_256/
    info/synsets.txt                                line i + 1 begins with the WordNet id of label i
    google/q0001/*.jpg, flickr/q0001/*.jpg          a folder is a query, not a class
"""

from collections import Counter
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import index
from exnorm.data.paths import root_of
from exnorm.data.sample_index import SampleIndex
from exnorm.data.sets import imagefolder
from exnorm.data.sets.imagenet import WNID
from exnorm.data.splits import Splits

QUERY_MAP = "queries_synsets_map.txt"
ORIGINS = ("google", "flickr", "all")
VAL_FOLDERS = ("val_images_256", "val_images", "val")
LAYOUT = "expected DIR/info/train_filelist_all.txt, DIR/info/synsets.txt, DIR/google/, DIR/flickr/, DIR/val_images_256/"


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the paths and labels in the lists, and of the classes."""
    root = root_of(config, layout=LAYOUT, name="webvision")
    return imagefolder.fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images are opened one by one."""
    root = root_of(config, layout=LAYOUT, name="webvision")
    both = found(config, root, train=train)
    return imagefolder.splits(config, root, both, list(both["val"].classes))


def found(config: Any, root: Path, *, train: bool) -> imagefolder.Found:
    """Return the listed files of both splits, or only of the first `data.num_classes` classes.

    Raises:
        UserError: an info file is missing, or has a label without a class.
    """
    if config.origin not in ORIGINS:
        raise UserError(f"data.origin={config.origin} is unknown; allowed: {', '.join(ORIGINS)}")
    classes = synsets(root)
    if config.num_classes is not None and not 1 <= config.num_classes <= len(classes):
        raise UserError(f"data.num_classes={config.num_classes}: allowed: 1 to {len(classes)}, the classes in {root}")
    both = {"val": index.of_list(_info(root, "val_filelist.txt"), _val_folder(root))}
    if train:
        both["train"] = index.of_list(_info(root, f"train_filelist_{config.origin}.txt"), root)
    named = imagefolder.named(both, classes, root / "info")
    if config.num_classes is None:
        return named
    return {split: _first_classes(part, config.num_classes) for split, part in named.items()}


def _first_classes(part: SampleIndex, count: int) -> SampleIndex:
    return part.where(part.labels < count).labelled_as(part.classes[:count], source=part.base)


def synsets(root: Path) -> list[str]:
    """Return the WordNet id of each label, in the order of the labels, which may be unsorted."""
    lines = _info(root, "synsets.txt").read_text(encoding="utf-8-sig", errors="replace").splitlines()
    classes = [line.split()[0] for line in lines if line.strip()]
    strange = [name for name in classes if not WNID.fullmatch(name)]
    if strange:
        raise UserError(f"{root}/info/synsets.txt: {strange[0]} is not a WordNet id such as n01440764")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise UserError(f"{root}/info/synsets.txt has {twice[0]} twice")
    return classes


def query_labels(root: Path) -> dict[str, int]:
    """Return the label of each query. The file counts classes from 1; labels count from 0.

    Raises:
        UserError: a line is not two numbers.
    """
    lines = _info(root, QUERY_MAP).read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split() for line in lines if line.strip()]
    odd = next((pair for pair in pairs if len(pair) != 2 or not all(word.isdecimal() for word in pair)), None)
    if odd is not None:
        raise UserError(f"{root}/info/{QUERY_MAP}: expected lines of a query and its class, found '{' '.join(odd)}'")
    return {f"q{int(query):04}": int(label) - 1 for query, label in pairs}


def _info(root: Path, name: str) -> Path:
    file = root / "info" / name
    if not file.is_file():
        raise UserError(f"{root}: there is no info/{name}; {LAYOUT}")
    return file


def _val_folder(root: Path) -> Path:
    for name in VAL_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root}: there is no folder {' or '.join(VAL_FOLDERS)}; {LAYOUT}")
