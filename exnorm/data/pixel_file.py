"""Files of pixels in the cache, made once per machine and mapped into memory.

A file begins with a line of JSON, padded to 4,096 bytes, with the number and the checksum of the bytes that follow.
"""

import functools
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from exnorm.runs.cache import cache_folder
from exnorm.runs.lock import alone

HEADER = 4096  # bytes


class PixelFile(NamedTuple):
    """The path of a file, and the shape of one of its images. It is small, so each process can map the file anew."""

    path: str
    shape: tuple[int, ...]

    @property
    def images(self) -> np.ndarray:
        """All images, (images, *shape) in uint8, mapped into memory."""
        return _mapped(self.path, self.shape)

    def read_pixels(self, indices: np.ndarray) -> np.ndarray:
        """Return the images with these indices, (images, *shape) in uint8."""
        return self.images[indices]

    def open_image(self, index: int) -> Image.Image:
        """Return image i in RGB, which are its first three channels."""
        return Image.fromarray(np.ascontiguousarray(self.images[index, ..., :3]))


def made_once(name: str, shape: tuple[int, ...], count: int, fill: Callable[[Path], None]) -> PixelFile:
    """Return the file `name` of the cache. If it is missing or damaged, one process makes it while others wait.

    Args:
        fill: writes the images into a file, from byte HEADER on. If it raises an error, there is no file.
    """
    path = cache_folder() / name
    with alone(path.with_suffix(".lock")):
        if not _is_complete(path):
            part = path.with_suffix(".part")  # the leftover of a process that was killed is overwritten
            with part.open("wb") as file:
                file.truncate(HEADER + count * int(np.prod(shape)))
            try:
                fill(part)
            except BaseException:
                part.unlink()
                raise
            checksum = json.dumps(_content(part))
            with part.open("r+b") as file:
                file.write(checksum.encode().ljust(HEADER))
            part.replace(path)
            _mapped.cache_clear()
    return PixelFile(str(path), shape)


def _is_complete(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with path.open("rb") as file:
            complete = json.loads(file.read(HEADER)) == _content(path)
    except (OSError, ValueError):
        complete = False
    if not complete:
        print(f"exnorm: warning: {path} is damaged; it is made again", file=sys.stderr, flush=True)
    return complete


def _content(path: Path) -> dict[str, int]:
    """Return the number and the checksum of the bytes of a file's images."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(HEADER)
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size - HEADER, "crc32": checksum}


@functools.cache
def _mapped(path: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", HEADER).reshape(-1, *shape)
