"""Opening the file of an image as RGB, as torchvision's `pil_loader` does: EXIF rotation is ignored, an animation is
its first frame, transparency is dropped. What Pillow would clip is scaled: 16 bits to 8, and floats from 0 to 1.
"""

import errno
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from exnorm.config.errors import UserError
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import Images

# What is wrong with a file; any other error of the system is the machine's, and passes.
OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class BadImage(UserError):
    """A file that cannot be read as an image: its path from the root of the data, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is no readable image ({reason})")
        self.name, self.reason = name, reason


def images(entries: SampleIndex, root: Path) -> Images:
    """Images that are opened one by one; a broken one raises BadImage."""
    return Images(entries.labels, partial(_open, entries, os.path.relpath(entries.base, root)))


def _open(entries: SampleIndex, prefix: str, index: int) -> Image.Image:
    name = os.path.normpath(os.path.join(prefix, entries.names[index]))
    return opened(name, partial(_file, entries, index))


def _file(entries: SampleIndex, index: int) -> BinaryIO:
    if entries.spans is None:
        return open(os.path.join(entries.base, entries.names[index]), "rb")
    tar, offset, size = (int(number) for number in entries.spans[index])
    with open(entries.tars[tar], "rb") as file:
        return io.BytesIO(os.pread(file.fileno(), size, offset))


def opened(name: str, file: Callable[[], BinaryIO]) -> Image.Image:
    """The image of a file that is opened here.

    Raises:
        BadImage: something is wrong with the file.
        UserError: something is wrong with the machine.
    """
    try:
        with file() as stream:
            return rgb(stream)
    except UnidentifiedImageError:
        raise BadImage(name, "no known format of an image") from None
    except Exception as problem:  # noqa: BLE001  # whatever a decoder trips over is in the file
        number = problem.errno if isinstance(problem, OSError) else None  # a decoder's own OSError has none
        if isinstance(problem, MemoryError) or (number is not None and number not in OF_THE_FILE):
            text = f"{name} cannot be read now: {str(problem) or 'no memory is left'}"
            raise UserError(f"{text}; the same command goes on from the last checkpoint") from None
        reason = str(problem) if number is None else os.strerror(number)
        raise BadImage(name, " ".join(reason.split()) or type(problem).__name__) from None


def rgb(file: BinaryIO) -> Image.Image:
    """The image of a file, in RGB."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow names them by their byte order
            pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "F" and (scale := _scale_of(np.asarray(image))) != 1:
            return Image.fromarray((np.asarray(image) * scale + 0.5).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # Pillow warns of the direct way
        return image.convert("RGB")


def _scale_of(values: np.ndarray) -> float:
    """What makes bytes of floats. White is 1, 255 or 65,535, the lowest of them that no value exceeds.

    Raises:
        ValueError: values of which none is known to be white.
    """
    lowest, highest = float(values.min()), float(values.max())
    if 1 < highest <= 255:
        return 1
    if lowest >= 0 and highest <= 65535:
        return 255 / (1 if highest <= 1 else 65535)
    raise ValueError(f"floats from {lowest:g} to {highest:g}; they may go from 0 to 1, to 255 or to 65535")
