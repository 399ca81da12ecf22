"""ImageNet-1k (ILSVRC 2012): 1,281,167 training and 50,000 validation images in 1,000 classes.

O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. Classes are WordNet ids, in
sorted order, as in timm and torchvision. A subset of the classes (ImageNet-100) works, too. The layouts that are read:

    train/<wnid>/, val/<wnid>/       as `extract_ILSVRC.sh` leaves it
    val/ILSVRC2012_val_*.JPEG        as unpacked, with its labels in one of: val.txt (lines `file label`),
                                     LOC_val_solution.csv (Kaggle), ILSVRC2012_devkit_t12/ (with meta.mat),
                                     imagenet_2012_validation_synset_labels.txt; or data.val_list=FILE
    data.train_list, data.val_list   list files, such as those of SN's authors
    data.source=tar                  tar files, one for each class or in WebDataset's shards
    data.source=hfds/NAME            a data set that timm reads from Hugging Face's `datasets`
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import from_timm, index
from exnorm.data.packed import Packed
from exnorm.data.paths import file_of, root_of
from exnorm.data.sample_index import SampleIndex
from exnorm.data.sets import imagefolder
from exnorm.data.splits import Splits

LAYOUT = "expected DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG"
DEVKIT = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
TRUTHS = ("val.txt", "LOC_val_solution.csv", DEVKIT, "imagenet_2012_validation_synset_labels.txt")
WNID = re.compile(r"n\d{8}")


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths, labels and sizes of all images, or of the source's name."""
    if from_timm.is_named(config.source):
        return from_timm.fingerprint(config)
    root = root_of(config, layout=LAYOUT)
    return imagefolder.fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images are opened one by one.

    Raises:
        UserError: a class is not one of ImageNet's.
    """
    if from_timm.is_named(config.source):
        both = from_timm.load(config, train=train)
        if len(both.classes) == len(synsets()):
            return replace(both, classes=synsets())
        check(list(both.classes), config.source)
        return both
    root = root_of(config, layout=LAYOUT)
    both = found(config, root, train=train)
    names = class_names(imagefolder.naming_split(config, root, both), root)
    check(names, str(root))
    return imagefolder.splits(config, root, imagefolder.named(both, names, root), sorted(names))


def found(config: Any, root: Path, *, train: bool) -> imagefolder.Found:
    """Return the files of both splits; those of validation may be in one folder, with their labels in a file."""
    val = root / "val"
    raw = config.source is None and val.is_dir() and not any(entry.is_dir() for entry in val.iterdir())
    if not raw and config.val_list is None:
        return imagefolder.found(config, root, train=train)
    both = {"val": ground_truth(_truth_file(config, root), root)}
    return both | ({"train": imagefolder.entries(config, root, "train")} if train else {})


def _truth_file(config: Any, root: Path) -> Path:
    if config.val_list is not None:
        return file_of(config.val_list, root, "data.val_list")
    for name in TRUTHS:
        if (root / name).is_file():
            return root / name
    raise UserError(
        f"{root}/val has no class folders, and {root} has none of the label files {', '.join(TRUTHS)}. Give "
        "data.val_list=FILE, or sort the images into val/<wnid>/"
    )


def ground_truth(file: Path, root: Path) -> SampleIndex:
    """Return the images of `val/` with their labels, read from one of the label files above.

    Raises:
        UserError: the file has another format, or labels another number of images.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    first = lines[0] if lines else ""
    if len(first.split()) > 1 and not first.startswith("ImageId"):
        return imagefolder.from_list(file, root, "val")
    if not (root / "val").is_dir():
        raise UserError(f"{file} labels the images in {root}/val, but there is no such folder")
    names = sorted(entry.name for entry in (root / "val").iterdir() if index.is_image(os.fsencode(entry.name)))
    labels: list[str | None] = [*lines]
    if first.startswith("ImageId"):
        label_of = {name: rest[:9] for name, _, rest in (line.partition(",") for line in lines[1:])}
        labels = [label_of.get(name.rpartition(".")[0]) for name in names]
    elif first.isdecimal():
        wnid_of = _devkit_ids(file.with_name("meta.mat"))
        labels = [wnid_of.get(line) for line in lines]
    if not names or len(labels) != len(names) or not all(label and WNID.fullmatch(label) for label in labels):
        raise UserError(f"{file} does not have one label for each of the {len(names)} images in {root}/val")
    classes = sorted({label for label in labels if label is not None})
    places = {name: place for place, name in enumerate(classes)}
    numbers = np.array([places[label] for label in labels if label is not None], np.int32)
    return SampleIndex(Packed.of(name.encode() for name in names), numbers, classes, str(root / "val"))


def _devkit_ids(file: Path) -> dict[str, str]:
    """Return the WordNet id of each number in the development kit, which has its own order of classes."""
    from scipy.io import loadmat

    if not file.is_file():
        raise UserError(
            f"{file.parent} has labels that are only numbers. Put the development kit's {file.name} into this folder"
        )
    try:
        return {str(row[0]): str(row[1]) for row in loadmat(file, squeeze_me=True)["synsets"]}
    except Exception as problem:  # noqa: BLE001  # any error of scipy comes from the file
        raise UserError(f"{file} is not the meta.mat of the development kit ({problem})") from None


def class_names(part: SampleIndex, root: Path) -> list[str]:
    """Return the WordNet id of each label: the name of its folder, or the id at this index among all 1,000.

    Raises:
        UserError: labels are numbers and there are not 1,000 classes, so their ids are unknown.
    """
    names = imagefolder.class_names(part)
    if not part.numbered or all(WNID.fullmatch(name) for name in names):
        return names
    if len(names) != len(synsets()):
        raise UserError(
            f"{root}: labels are numbers from 0 to {len(names) - 1}. Numbers name classes only if there are all "
            f"{len(synsets())} of them. Write WordNet ids instead, or put each class into a folder named by its id"
        )
    return synsets()


def synsets() -> list[str]:
    """Return the 1,000 WordNet ids in timm's order, which is sorted."""
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


def check(names: list[str], source: str) -> None:
    """Raise UserError for classes that are not in ImageNet."""
    strange = sorted(set(names) - set(synsets()))
    if strange:
        raise UserError(
            f"{source}: {len(strange)} classes are not WordNet ids of ImageNet-1k, such as {strange[0]}. For your own "
            "classes use data=imagefolder"
        )
