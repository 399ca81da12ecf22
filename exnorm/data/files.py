"""Open image files as RGB, as torchvision's `pil_loader` does.

EXIF rotation is ignored, an animation becomes its first frame, and transparency is dropped. Values that Pillow would
clip are scaled: 16 bits to 8, and floats from 0 to 1.
"""

import contextlib
import errno
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from exnorm.config.errors import UserError
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import Images

CHANGED = "Type the same command again, which reads the list of files anew"
CONTINUES = "Type the same command again, which continues with the file as it is now, or add fresh=true to start over"
# Errors that come from the file. Any other system error comes from the machine and may be temporary.
OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
T = TypeVar("T")


class BadImage(UserError):
    """A file cannot be read as an image. `name` is its path relative to the root of the data."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is not a readable image ({reason})")
        self.name, self.reason = name, reason


def images(entries: SampleIndex, root: Path) -> Images:
    """Return images that are opened one by one; a broken one raises BadImage."""
    return Images(entries.labels, partial(read_file, entries, root, rgb), name_of=partial(_name_in_split, entries))


def _name_in_split(entries: SampleIndex, index: int) -> str:
    """Return the path of a file from the folder of its split, or that of a member in its tar file."""
    name = entries.names[index]
    return name if entries.spans is None else name.partition("/")[2]


def name_of(entries: SampleIndex, root: Path, index: int) -> str:
    """Return the path of a file relative to the root of the data."""
    return os.path.normpath(os.path.join(os.path.relpath(entries.base, root), entries.names[index]))


def read_file(entries: SampleIndex, root: Path, read: Callable[[BinaryIO], T], index: int) -> T:
    """Return what `read` makes of file `index`; a broken file raises BadImage.

    Raises:
        UserError: the file has changed since the scan, also while it was read.
    """
    file = partial(_file, entries, index)
    try:
        return decoded(name_of(entries, root, index), file, read)
    except BadImage:
        with contextlib.suppress(OSError), file():  # it raises UserError for a file that is written now
            pass
        raise


def _file(entries: SampleIndex, index: int) -> BinaryIO:
    """Open a file.

    Raises:
        UserError: it is gone, or its size or its time of change is another one than in the scan.
    """
    if entries.spans is not None:
        tar, offset, size = (int(number) for number in entries.spans[index])
        with open(entries.tars[tar], "rb") as file:
            return io.BytesIO(os.pread(file.fileno(), size, offset))
    path = os.path.join(entries.base, entries.names[index])
    size, changed_ns = (-1, -1) if entries.stamps is None else map(int, entries.stamps[index])
    try:
        stream = open(path, "rb")  # noqa: SIM115  # the caller closes it
    except FileNotFoundError:
        if size < 0:
            raise
        raise _changed(entries, path, "it is gone") from None
    now = os.fstat(stream.fileno())
    if size >= 0 and now.st_size != size:
        stream.close()
        raise _changed(entries, path, f"it had {size} bytes and has {now.st_size} now")
    if changed_ns >= 0 and now.st_mtime_ns != changed_ns:
        stream.close()
        raise _changed(entries, path, "its modification time is not that in the list of files", CONTINUES)
    return stream


def _changed(entries: SampleIndex, path: str, how: str, advice: str = CHANGED) -> UserError:
    """Return the error, and remove the kept scan, which compares only a sample of its entries with the files."""
    if entries.kept_in:
        with contextlib.suppress(OSError):
            os.unlink(entries.kept_in)
    return UserError(f"{path} has changed: {how}. {advice}")


def opened(name: str, file: Callable[[], BinaryIO]) -> Image.Image:
    """Open a file with `file()` and return its image in RGB, with the errors of `decoded`."""
    return decoded(name, file, rgb)


def decoded(name: str, file: Callable[[], BinaryIO], read: Callable[[BinaryIO], T]) -> T:
    """Open a file with `file()` and return what `read` makes of it.

    Raises:
        BadImage: something is wrong with the file.
        UserError: the file has changed since the start, or something is wrong with the machine.
    """
    try:
        with file() as stream:
            return read(stream)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise BadImage(name, "the image format is not known") from None
    except Exception as problem:  # noqa: BLE001  # any other error of a decoder comes from the file
        number = problem.errno if isinstance(problem, OSError) else None  # a decoder's own OSError has none
        if isinstance(problem, MemoryError) or (number is not None and number not in OF_THE_FILE):
            text = f"{name} cannot be read now: {str(problem) or 'no memory is left'}"
            raise UserError(f"{text}. The same command continues from the last checkpoint") from None
        reason = str(problem) if number is None else os.strerror(number)
        raise BadImage(name, " ".join(reason.split()) or type(problem).__name__) from None


def rgb(file: BinaryIO) -> Image.Image:
    """Return the image of a file in RGB."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow names them by their byte order
            pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "F" and (scale := _scale_of(np.asarray(image))) != 1:
            return Image.fromarray((np.asarray(image) * scale + 0.5).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # Pillow warns about a direct conversion
        return image.convert("RGB")


def _scale_of(values: np.ndarray) -> float:
    """Return the factor from floats to bytes. White is 1, 255 or 65,535: the lowest that no value exceeds.

    Raises:
        ValueError: the values are in none of these ranges.
    """
    lowest, highest = float(values.min()), float(values.max())
    if 1 < highest <= 255:
        return 1
    if lowest >= 0 and highest <= 65535:
        return 255 / (1 if highest <= 1 else 65535)
    raise ValueError(f"floats from {lowest:g} to {highest:g}; allowed are 0 to 1, 0 to 255 and 0 to 65535")
