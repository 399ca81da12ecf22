"""Lines that `exnorm doctor` prints for any data set: opened and broken files, sizes, mean and deviation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import ImageFont

from exnorm.data.files import BadImage
from exnorm.data.paths import listed_paths
from exnorm.runs.folder import write_text_atomic

SHOWN = 5
OFF_MEAN, OFF_STD = 0.1, 0.3  # larger differences of a channel are reported; STD relative to the constant


class Look(NamedTuple):
    """The number of images of a split that were opened, the broken ones, and the number of masks with wrong values."""

    opened: int
    bad: list[BadImage]
    wrong: int = 0


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return up to `count` indices below `total`, evenly spaced; all of them if `count` is 0."""
    return np.linspace(0, total - 1, min(count or total, total)).round().astype(int).tolist()


def print_opened(split: str, *, opened: int, total: int, bad: Sequence[BadImage], wrong: int = 0) -> None:
    """Print how many of the opened images are good, neither broken nor wrong, and the first broken ones."""
    rest = f" (of {total}; --images 0 opens all)" if opened < total else ""
    print(f"{split}: {opened - len(bad) - wrong} of {opened} opened images are good{rest}")
    for problem in bad[:SHOWN]:
        print(f"  broken: {problem.name} ({problem.reason})")
    if len(bad) > SHOWN:
        print(f"  and {len(bad) - SHOWN} more")


def print_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Print the smallest, median and largest width and height."""
    sides = np.array(sizes)
    low, middle, high = (f"{side[0]:.0f} x {side[1]:.0f}" for side in (sides.min(0), np.median(sides, 0), sides.max(0)))
    print(f"  width x height from {low} over {middle} to {high}")


def print_channels(mean: np.ndarray, mean_of_squares: np.ndarray, config: Any) -> None:
    """Print mean and deviation of the channels, where white is 1, and those in use."""
    std = np.sqrt(mean_of_squares - mean**2)
    off = np.abs(mean - config.mean).max() > OFF_MEAN or (np.abs(std / config.std - 1) > OFF_STD).any()
    print(
        f"  mean {_numbers(mean)} (in use {_numbers(config.mean)}), std {_numbers(std)} (in use "
        f"{_numbers(config.std)})" + ("; far from each other" if off else "")
    )


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def list_broken(config: Any, file: Path, problems: Sequence[tuple[str, str]]) -> None:
    """Write the paths that `data.exclude` has now, and the broken files, each below its reason.

    Args:
        problems: path and reason of each.
    """
    before = [os.fsdecode(path) for path in listed_paths(config)]
    lines = [line for name, reason in problems for line in (f"# {reason}", name)]
    write_text_atomic(file, "\n".join([*before, *lines]) + "\n")
    kept = f", below the {len(before)} of data.exclude={config.exclude}" if before else ""
    print(f"broken images: all {len(problems)} are listed in {file}{kept}; data.exclude={file} leaves them out")


def sheet_font() -> ImageFont.FreeTypeFont:
    """Return the font of captions on sheets."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)


def fitted(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Return a text, cut off where it is wider than `width` px."""
    while font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
