"""The checks of `exnorm doctor data=NAME` for sets with masks: broken files, values, shares of the classes, a sheet."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import data_set
from exnorm.data.files import BadImage
from exnorm.data.masks import UnknownValues
from exnorm.data.palette import colours, overlaid
from exnorm.data.splits import IGNORED, MaskedImages, Splits
from exnorm.diagnostics.doctor_lines import (
    SHOWN,
    Look,
    evenly_spaced,
    print_channels,
    print_opened,
    print_sizes,
)
from exnorm.diagnostics.mask_sheet import draw_sheet

ROWS, COLUMNS = 4, 6  # of the sheet


def examine(config: Any, splits: Splits, named: Mapping[str, Any], count: int, path: Path) -> dict[str, Look]:
    """Print what there is to say of images with masks, draw their sheet, and return the look at each split.

    Args:
        named: the validation sets.
        count: number of images of each split to open; 0 opens all.
        path: file of the sheet.
    """
    train = splits.train
    assert isinstance(train, MaskedImages)
    parts: dict[str, MaskedImages] = {"train": train, **named}
    for name, images in parts.items():
        print(_counts(config, name, images, len(splits.classes)))
    looks, tables = {}, {}
    for name, images in parts.items():
        looks[name], tables[name] = _look(config, name, images, count)
    _print_classes(splits.classes, tables)
    sheet_of(train, splits.classes).save(path, optimize=True)
    print(f"sheet: up to {ROWS * COLUMNS} training images with their masks in {path}")
    return looks


def _counts(config: Any, split: str, images: MaskedImages, classes: int) -> str:
    complete = getattr(data_set(config), "COMPLETE", {})
    name = "train" if split == "train" else config.split or "val"
    own = split in ("train", f"val ({config.name})")
    full = complete.get(name) if own else None
    line = f"{split}: {len(images)} images with masks of {classes} classes"
    line += f"; the complete set has {full}" if full not in (None, len(images) + images.excluded) else ""
    return line + (f"; {images.excluded} excluded" if images.excluded else "")


def _look(config: Any, split: str, images: MaskedImages, count: int) -> tuple[Look, np.ndarray]:
    """Open images and masks of a split and print what is broken or wrong, sizes, channels and speed.

    Return the look, and (256, 2): for each value of a mask the number of pixels, and of images that have it.
    """
    chosen = evenly_spaced(len(images), count)
    bad, wrong, sizes = [], [], []
    levels_C, table = np.zeros((3, 256)), np.zeros((256, 2), np.int64)
    start = time.perf_counter()
    for index in chosen:
        try:
            image, mask = images.open(index)
        except BadImage as problem:
            bad.append(problem)
            continue
        except UserError as problem:
            if not isinstance(problem.__cause__, UnknownValues):
                raise
            wrong.append(problem)
            continue
        sizes.append(image.size)
        levels_C += np.array(image.histogram()).reshape(3, 256) / (image.width * image.height)
        pixels = np.array(mask.histogram())
        table += np.stack([pixels, pixels > 0], 1)
    seconds = time.perf_counter() - start
    print_opened(split, opened=len(chosen), total=len(images), bad=bad, wrong=len(wrong))
    _print_wrong(wrong)
    if sizes:
        print_sizes(sizes)
        white = np.arange(256) / 255
        print_channels(levels_C @ white / len(sizes), levels_C @ white**2 / len(sizes), config)
        print(f"  {len(chosen) / seconds:.0f} images with masks are opened per second by one process")
    return Look(len(chosen), bad, len(wrong)), table


def _print_wrong(problems: Sequence[UserError]) -> None:
    """Print the first masks with wrong values, and each wrong value with the number of masks that have it."""
    for problem in problems[:SHOWN]:
        print(f"  wrong: {problem}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN} more")
    causes = [problem.__cause__ for problem in problems]
    values = Counter(value for cause in causes if isinstance(cause, UnknownValues) for value in cause.pixels)
    if values:
        listed = ", ".join(f"{value} in {number}" for value, number in sorted(values.items())[:SHOWN])
        more = f" and {len(values) - SHOWN} other values" if len(values) > SHOWN else ""
        print(f"  values that are no classes, and the number of masks that have them: {listed}{more}")


def _print_classes(classes: Sequence[str], tables: Mapping[str, np.ndarray]) -> None:
    """Print the share of each class in the pixels of every split, and the number of images that have it."""
    width = max(len(name) for name in (*classes, "no class"))
    print(f"{'class':{width}}  " + "  ".join(f"{f'% of {name}':>20}  {'images':>6}" for name in tables))
    for name, value in [*((name, value) for value, name in enumerate(classes)), ("no class", IGNORED)]:
        cells = []
        for table in tables.values():
            scored = table[:IGNORED, 0].sum() if value != IGNORED else table[:, 0].sum()
            share = 100 * table[value, 0] / max(1, scored)
            cells.append(f"{share:20.3f}  {table[value, 1]:6}")
        print(f"{name:{width}}  " + "  ".join(cells))
    for split, table in tables.items():
        absent = [name for value, name in enumerate(classes) if not table[value, 0]]
        if absent:
            rest = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            print(f"{split}: no opened mask has {', '.join(absent[:SHOWN])}{rest}")


def sheet_of(images: MaskedImages, classes: Sequence[str]) -> Image.Image:
    """Return images under the colours of their masks, evenly spaced over the set."""
    table = colours(len(classes))
    tiles: list[Image.Image | None] = []
    for index in evenly_spaced(len(images), ROWS * COLUMNS):
        try:
            tiles.append(overlaid(*images.open(index), table))
        except UserError:  # it is broken; the look at its split names it
            tiles.append(None)
    return draw_sheet(tiles, classes, columns=COLUMNS)
