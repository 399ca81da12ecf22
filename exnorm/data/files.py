"""Opening the file of an image as RGB, as torchvision's `pil_loader` does: EXIF rotation is ignored, an animation is
its first frame, transparency is dropped. What Pillow would clip is scaled: 16 bits to 8.
"""

import functools
import io
import os
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image

from exnorm.data.entries import Entries
from exnorm.data.splits import Images


class BadImage(Exception):
    """A file that cannot be read as an image: its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def images(entries: Entries) -> Images:
    """Images that are opened one by one; a broken one raises BadImage."""
    return Images(entries.labels, partial(_open, entries))


def _open(entries: Entries, index: int) -> Image.Image:
    return opened(os.path.join(entries.base, entries.names[index]), partial(_file, entries, index))


def _file(entries: Entries, index: int) -> BinaryIO:
    if entries.spans is None:
        return open(os.path.join(entries.base, entries.names[index]), "rb")
    tar, offset, size = (int(number) for number in entries.spans[index])
    return io.BytesIO(os.pread(_handle(entries.tars[tar]), size, offset))


def opened(name: str, file: Callable[[], BinaryIO]) -> Image.Image:
    """The image of a file that is opened here.

    Raises:
        BadImage: it cannot be opened or read.
    """
    try:
        with file() as stream:
            return rgb(stream)
    except Exception as problem:  # noqa: BLE001  # whatever a decoder trips over is in the file
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise BadImage(name, " ".join(reason.split()) or type(problem).__name__) from None


@functools.lru_cache(maxsize=512)
def _handle(tar: str) -> int:
    """An open tar file; `pread` moves no position, so processes that fork may share it."""
    return os.open(tar, os.O_RDONLY)


def rgb(file: BinaryIO) -> Image.Image:
    """The image of a file, in RGB."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow names them by their byte order
            pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # Pillow warns of the direct way
        return image.convert("RGB")
