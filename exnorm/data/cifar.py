"""The code that CIFAR-10 and CIFAR-100 share. It reads their unpacked python archives with torchvision."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.paths import root_of
from exnorm.data.splits import Images, Splits

ARCHIVES = {"cifar-10-batches-py": "cifar-10-python.tar.gz", "cifar-100-python": "cifar-100-python.tar.gz"}
PARTS = {
    "cifar-10-batches-py": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
    "cifar-100-python": ("train", "test", "meta"),
}


def fingerprint(config: Any, folder: str) -> str:
    """Return a hash of the files' names and sizes; torchvision checks their content.

    Raises:
        UserError: the folder or a file in it does not exist.
    """
    archive = ARCHIVES[folder]
    layout = f"expected DIR/{folder}/, unpacked from {archive} of www.cs.toronto.edu/~kriz"
    root = root_of(config, layout=layout) / folder
    missing = [name for name in PARTS[folder] if not (root / name).is_file()]
    if missing:
        raise UserError(f"there is no {root}/{missing[0]}; {layout}")
    parts = [(name, (root / name).stat().st_size) for name in PARTS[folder]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load(config: Any, name: str, mistaken_for: Sequence[int] | None) -> Splits:
    """Return both splits of torchvision's class `name`."""
    from torchvision import datasets

    root = root_of(config, layout="")
    try:
        train, test = (getattr(datasets, name)(root, train=split) for split in (True, False))
    except RuntimeError:  # its advice is an option that exnorm does not have
        raise UserError(f"{root}: torchvision finds the files of {name} corrupted. Unpack the archive again") from None
    return Splits(_images(train), _images(test), list(train.classes), mistaken_for)


def _images(part: Any) -> Images:
    return Images(list(part.targets), partial(_open, part.data), read_pixels=partial(np.take, part.data, axis=0))


def _open(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])
