"""Cityscapes: 2,975 training and 500 validation images of streets, 2048 x 1024 px, in 19 classes.

M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016. The files are those of
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip:

    leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png
    gtFine/{train,val}/<city>/*_gtFine_labelIds.png

The files of masks have the ids of all 34 labels. 19 of them are the classes ("trainIds"); the others are ignored. The
masks of `test` are not public. `exnorm predict` writes masks in labelIds, as the benchmark's server expects them.
"""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.data import masks, pairs
from exnorm.data.paths import root_of
from exnorm.data.splits import IGNORED, Splits

LAYOUT = "expected DIR/leftImg8bit/{train,val}/<city>/ and DIR/gtFine/{train,val}/<city>/, as in data.root=DIR"
COMPLETE = {"train": 2_975, "val": 500}
ENDS = pairs.Ends("_leftImg8bit.png", "_gtFine_labelIds.png")


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths and sizes of all images and masks."""
    root = root_of(config, layout=LAYOUT)
    return pairs.fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images and masks are opened one by one."""
    root = root_of(config, layout=LAYOUT)
    ids = label_ids()
    values = dict.fromkeys([*range(34), IGNORED], IGNORED) | {value: place for place, value in enumerate(ids)}
    mask_values = masks.mask_values(values, allowed="0 to 33, the labelIds of Cityscapes")
    return masks.splits(root, found(config, root, train=train), mask_values, class_names())


def found(config: Any, root: Path, *, train: bool) -> dict[str, pairs.Pairs]:
    """Return the files of both splits, or only those of validation without `train`."""
    return pairs.of_splits({"train": "train", "val": "val"}, partial(_split, config, root), train=train)


def _split(config: Any, root: Path, split: str) -> pairs.Pairs:
    images = pairs.tree(root / "leftImg8bit" / split, ENDS.image, layout=LAYOUT)
    mask_files = pairs.tree(root / "gtFine" / split, ENDS.mask, layout=LAYOUT)
    return pairs.matched(config, root, images, mask_files, ENDS)


@functools.cache
def _classes() -> tuple[Any, ...]:
    """Return torchvision's entries of the 19 classes, sorted by trainId; imports torch."""
    from torchvision.datasets import Cityscapes

    evaluated = [label for label in Cityscapes.classes if 0 <= label.train_id < IGNORED]
    return tuple(sorted(evaluated, key=lambda label: label.train_id))


def class_names() -> list[str]:
    """Return the names of the 19 classes."""
    return [label.name for label in _classes()]


def label_ids() -> list[int]:
    """Return the labelId of each of the 19 classes."""
    return [label.id for label in _classes()]


def to_label_ids(mask: np.ndarray) -> np.ndarray:
    """Return a mask of classes 0 to 18 in labelIds, in uint8, as the benchmark's server expects them.

    IGNORED becomes 0, "unlabeled".

    Raises:
        ValueError: the mask has another value.
    """
    table = np.zeros(256, np.uint8)
    ids = label_ids()
    table[: len(ids)] = ids
    if ((mask < 0) | (mask >= len(ids)) & (mask != IGNORED)).any():
        raise ValueError(f"values from {mask.min()} to {mask.max()}: classes are 0 to {len(ids) - 1}, or {IGNORED}")
    return table[mask]
