"""Open masks: a class for every pixel, from the values in the files of a data set.

A file's values are its numbers, not its colours: the indices of a palette image, the stored numbers of a grey one.
Pillow scales the numbers of grey images with 2 and 4 bits to 0 to 255; this is undone here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.files import BadImage, name_of, read_file, rgb
from exnorm.data.pairs import Pairs
from exnorm.data.splits import IGNORED, NO_MASKED_IMAGES, MaskedImages, Splits

SCALES = {"L;2": 85, "L;4": 17}  # Pillow's factors on the values of grey images with few bits
SHOWN = 3
MAX_COMPARED = 5000  # images whose sizes are compared; of more it is not known whether they have the same


class UnknownValues(ValueError):
    """A mask has values that are no classes. It is the cause of a UserError.

    Attributes:
        pixels: the number of pixels of each value; empty for a mask in colour.
    """

    def __init__(self, pixels: Mapping[int, int]) -> None:
        super().__init__(f"values {sorted(pixels)}")
        self.pixels = pixels


class BadMask(BadImage):
    """A mask does not have the size of its image."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.args = (f"{name} does not fit its image: {reason}",)


@dataclass(frozen=True)
class MaskValues:
    """The meaning of the values in the masks of a data set.

    Attributes:
        classes: (256,) in uint8, the class of each value, or IGNORED.
        known: (256,) whether a value may occur.
        allowed: the allowed values in words.
    """

    classes: np.ndarray
    known: np.ndarray
    allowed: str


def mask_values(classes: Mapping[int, int], *, allowed: str) -> MaskValues:
    """Return the table of a mapping from values to classes or to IGNORED."""
    table = np.full(256, IGNORED, np.uint8)
    table[list(classes)] = list(classes.values())
    known = np.zeros(256, bool)
    known[list(classes)] = True
    return MaskValues(table, known, allowed)


def splits(root: Path, both: Mapping[str, Pairs], values: MaskValues, classes: Sequence[str]) -> Splits:
    """Return the splits of a data set, with train empty if it is not in `both`; images and masks are opened singly."""
    train = masked_images(both["train"], root, values) if "train" in both else NO_MASKED_IMAGES
    val = masked_images(both["val"], root, values, same_size=of_same_size(both["val"], root))
    return Splits(train, val, classes)


def masked_images(pairs: Pairs, root: Path, values: MaskValues, *, same_size: bool = False) -> MaskedImages:
    """Return images and masks that are opened one by one."""
    return MaskedImages(
        len(pairs),
        partial(read_file, pairs.images, root, rgb),
        partial(_open_mask, pairs, root, values),
        same_size=same_size,
        excluded=pairs.excluded,
    )


def of_same_size(pairs: Pairs, root: Path) -> bool:
    """Return whether all images have the same size; those that cannot be opened do not count."""
    first = None
    for place in range(len(pairs) if len(pairs) <= MAX_COMPARED else 0):
        try:
            size = read_file(pairs.images, root, size_of, place)
        except BadImage:
            continue
        if size != (first := first or size):
            return False
    return first is not None


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Return the width and height of an image, without reading its pixels."""
    with Image.open(file) as image:
        return image.size


def _open_mask(pairs: Pairs, root: Path, values: MaskValues, index: int) -> Image.Image:
    """Return mask `index` in classes.

    Raises:
        BadImage: it cannot be read.
        BadMask: it does not have the size of its image.
        UserError: it has no single channel, or a value is no class. The cause is UnknownValues.
    """
    name = name_of(pairs.masks, root, index)
    mode, numbers_HW = read_file(pairs.masks, root, numbers, index)
    if numbers_HW is None:
        raise UserError(
            f"{name} is a colour image (Pillow's mode {mode}), so its values are no classes. A mask has one channel; "
            f"allowed values: {values.allowed}"
        ) from UnknownValues({})
    height, width = numbers_HW.shape
    size = read_file(pairs.images, root, size_of, index)
    if size != (width, height):
        raise BadMask(name, f"the mask has {width} x {height} pixels, its image {size[0]} x {size[1]}")
    return Image.fromarray(classes_of(numbers_HW, values, name))


def numbers(file: BinaryIO) -> tuple[str, np.ndarray | None]:
    """Return Pillow's mode of an image, and its stored numbers (height, width); None if it has several channels."""
    with Image.open(file) as image:
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            return image.mode, None
        stored_as = image.tile[0][3] if image.tile else None
        scale = SCALES.get(stored_as, 1) if isinstance(stored_as, str) else 1
        numbers_HW = np.asarray(image).astype(np.uint8) if image.mode == "1" else np.asarray(image)
        return image.mode, numbers_HW if scale == 1 else numbers_HW // scale


def classes_of(numbers_HW: np.ndarray, values: MaskValues, name: str) -> np.ndarray:
    """Return the class of each pixel in uint8.

    Raises:
        UserError: a number is no class; the message begins with `name`, and the cause is UnknownValues.
    """
    inside = numbers_HW.dtype == np.uint8 or (numbers_HW.min() >= 0 and numbers_HW.max() <= 255)
    if inside and values.known[numbers_HW].all():
        return values.classes[numbers_HW]
    found, counts = np.unique(numbers_HW, return_counts=True)
    pixels = {
        value: count
        for value, count in zip(found.tolist(), counts.tolist(), strict=True)
        if not (0 <= value <= 255 and values.known[value])
    }
    worst = sorted(pixels, key=lambda value: -pixels[value])
    listed = ", ".join(f"{value} ({pixels[value]} px)" for value in worst[:SHOWN])
    rest = f" and {len(worst) - SHOWN} other values" if len(worst) > SHOWN else ""
    raise UserError(
        f"{name} has values that are no classes: {listed}{rest}. Allowed: {values.allowed}. exnorm doctor counts such "
        "masks"
    ) from UnknownValues(pixels)
