"""A folder of images in ImageNet's layout: `train/<class>/<image>` and `val/<class>/<image>`.

Classes are the sorted names of the folders in `train/`; those of `val/` must be among them. Instead of folders there
may be list files (`data.train_list`, `data.val_list`: lines `path label`, paths from the root or from `train/` and
`val/`), or tar files (`data.source=tar`: the `*.tar` in `train/` and `val/`, or those whose name contains the word).
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import files, index
from exnorm.data.entries import Entries
from exnorm.data.places import excluded_places, file_of, root_of
from exnorm.data.splits import NO_IMAGES, Images, Splits

LAYOUT = "expected DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, as in data.root=DIR"
SOURCES = ("tar", "wds")
Found = dict[str, Entries]  # by split


def fingerprint(config: Any, *, train: bool = True) -> str:
    """The hash of the sorted relative paths, labels and sizes of all images."""
    root = root_of(config, layout=LAYOUT)
    return fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """List both splits; images are opened one by one."""
    root = root_of(config, layout=LAYOUT)
    both = found(config, root, train=train)
    names = class_names(both.get("train", both["val"]))
    return splits(config, root, named(both, names, root), names)


def found(config: Any, root: Path, *, train: bool) -> Found:
    """The files of both splits; those of training are not missed unless `train`.

    Raises:
        UserError: a folder, list or tar file is not there or is none.
    """
    if config.source not in (None, *SOURCES):
        raise UserError(
            f"data.source={config.source}: {config.name} reads {', '.join(SOURCES)}, and without it folders and lists"
        )
    both = {"val": entries(config, root, "val")}
    if train or (root / "train").is_dir() or config.train_list is not None:
        both["train"] = entries(config, root, "train")
    return both


def entries(config: Any, root: Path, split: str) -> Entries:
    """The files of a split, from its list, its tar files or its folder."""
    listed = config[f"{split}_list"]
    if listed is not None:
        return from_list(file_of(listed, root, f"data.{split}_list"), root, split)
    if config.source is not None:
        tars = sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{split}*.tar"))
        if not tars:
            raise UserError(f"data.source={config.source}: no tar files in {root}/{split}, and no {root}/*{split}*.tar")
        return index.of_tars(tars, tars[0].parent)
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}; {LAYOUT}")
    return index.of_folders(root / split)


def from_list(file: Path, root: Path, split: str) -> Entries:
    """The files in a list, whose paths begin in the folder of the split or in the root."""
    listed = index.of_list(file, root / split)
    within = (root / split / listed.names[0]).exists()
    return listed if within else replace(listed, base=str(root))


def is_numbered(part: Entries) -> bool:
    """Whether the labels came as numbers."""
    return all(name.isdigit() for name in part.classes)


def named(both: Found, names: list[str], root: Path) -> Found:
    """Both splits, those with numbers for labels with the names of the classes."""
    return {split: part.named(names, source=str(root)) if is_numbered(part) else part for split, part in both.items()}


def class_names(part: Entries) -> list[str]:
    """The names of classes; of those that are numbers the folder that holds a class's images, if there is one."""
    names = list(part.classes)
    if not is_numbered(part):
        return names
    labels, firsts = np.unique(part.labels, return_index=True)
    folders = [Path(part.names[first]).parent.name for first in firsts]
    if len(set(folders)) == len(names) and all(folders):
        for label, folder in zip(labels, folders, strict=True):
            names[label] = folder
    return names


def splits(config: Any, root: Path, both: Found, classes: list[str]) -> Splits:
    """Both splits over the same classes, without what the user excludes.

    Raises:
        UserError: a class of validation that is none of them.
    """
    parts = {split: part.labelled_as(classes, source=f"{root}: {split}") for split, part in both.items()}
    train = images(config, root, parts["train"]) if "train" in parts else NO_IMAGES
    return Splits(train, images(config, root, parts["val"]), classes)


def images(config: Any, root: Path, part: Entries) -> Images:
    """The images of a split without those that the user excludes."""
    places = excluded_places(part, config, root)
    kept = part.take(np.setdiff1d(np.arange(len(part)), places)) if len(places) else part
    return replace(files.images(kept), excluded=len(places))


def fingerprint_of(config: Any, root: Path, both: Found) -> str:
    """The hash of the files of both splits and of which of them are excluded."""
    digest = hashlib.sha256()
    for split, part in sorted(both.items()):
        excluded = excluded_places(part, config, root).tolist()
        digest.update(f"{split} {part.fingerprint()} {excluded}\n".encode())
    return digest.hexdigest()
