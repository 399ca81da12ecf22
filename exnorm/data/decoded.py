"""Small images that are decoded once per machine, into one file of the cache (`exnorm.data.pixel_file`).

Opening and decoding a JPEG of 32 pixels from a tar file takes 0.25 ms, as long as a small network needs to train on it.
All images of a split must have one size. Images are kept by themselves, without `data.cache=true`, if their sides have
at most 64 pixels and all of them together take at most 2 GiB. If one is broken or has another size, a small file in the
cache says so, and they are opened one by one from then on.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.files import BadImage
from exnorm.data.index import stamp_of
from exnorm.data.pixel_file import HEADER, PixelFile, made_once
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import Images
from exnorm.runs.cache import cache_folder

VERSION = 1  # another number for other pixels of the same files
LARGEST_SIDE = 64  # pixels
LARGEST = 2 << 30  # bytes
ADVICE = "Leave data.cache out, or list the file in data.exclude"
MANY = 10_000  # images whose decoding takes seconds, which is worth a line


class _Unlike(UserError):
    """An image has another size than the first one."""


def cached(images: Images, entries: SampleIndex, wanted: bool | None) -> Images:
    """Return images that are read from the cache, where they are decoded on first use.

    Args:
        entries: their files.
        wanted: whether they must be kept. None for keeping them if they are small, of one size and not broken.

    Raises:
        UserError: `wanted` is true, and an image is broken or has another size than the first one.
    """
    if wanted is False or not len(images):
        return images
    try:
        width, height = images.open_image(0).size
    except BadImage as problem:
        if wanted:
            raise UserError(f"data.cache=true: {problem}. {ADVICE}") from None
        return images
    small = max(width, height) <= LARGEST_SIDE and len(images) * width * height * 3 <= LARGEST
    if not (wanted or small):
        return images
    try:
        file = _made(images, entries, (height, width, 3), wanted)
    except (BadImage, _Unlike, OSError) as problem:
        if wanted:
            raise UserError(f"data.cache=true: {problem}. {ADVICE}") from None
        if len(images) >= MANY:
            print(f"exnorm: the images are opened one by one, because {problem}", file=sys.stderr, flush=True)
        return images
    if file is None:
        return images
    return replace(images, open_image=file.open_image, read_pixels=file.read_pixels)


def _made(images: Images, entries: SampleIndex, shape: tuple[int, ...], wanted: bool | None) -> PixelFile | None:
    """Return the file of decoded images. None if it was found before that there cannot be one."""
    name = f"decoded-{_key(entries)[:24]}"
    refused = cache_folder() / f"{name}.txt"
    if refused.exists() and not wanted:
        return None
    try:
        return made_once(f"{name}.bin", shape, len(images), partial(_decode_all, images.open_image, len(images), shape))
    except (BadImage, _Unlike) as problem:
        with contextlib.suppress(OSError):
            refused.write_text(f"{problem}\n", encoding="utf-8", errors="surrogateescape")
        raise


def _key(entries: SampleIndex) -> str:
    """Return a hash of the files' names and folder, and of the size and the time of change of each of them.

    A run's hash has no times and no folder. They are here because two folders may have files of the same names and
    sizes, and because a file may be written again. The kept index compares only a sample of the files.
    """
    digest = hashlib.sha256(repr((VERSION, entries.fingerprint(), os.path.abspath(entries.base))).encode())
    base = os.fsencode(entries.base)
    paths = map(os.fsencode, entries.tars)
    if entries.spans is None:
        paths = (os.path.join(base, entries.names.raw(place)) for place in range(len(entries)))
    for path in paths:
        digest.update(repr(stamp_of(path)).encode())
    return digest.hexdigest()


def _decode_all(open_image: Callable[[int], Image.Image], count: int, shape: tuple[int, ...], path: Path) -> None:
    if count >= MANY:
        print(f"exnorm: decoding {count} images into the cache, once on this machine", file=sys.stderr, flush=True)
    with path.open("r+b") as file:
        file.seek(HEADER)
        for index in range(count):
            pixels = np.asarray(open_image(index))
            if pixels.shape != shape:
                sizes = " and ".join(f"{wide} x {high}" for high, wide, _ in (pixels.shape, shape))
                raise _Unlike(f"images {index} and 0 have {sizes} pixels, and the cache needs one size")
            file.write(pixels.tobytes())
