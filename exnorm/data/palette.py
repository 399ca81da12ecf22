"""Colours for classes, and images with their masks in these colours."""

import functools

import numpy as np
from PIL import Image

from exnorm.data.splits import IGNORED

LEVELS = (0, 36, 73, 109, 146, 182, 219, 255)  # of a channel
DULL, DARK = 60, 120  # a smaller range between the channels is grey; a smaller maximum is too dark on an image
WEIGHTS = (2, 4, 3)  # of red, green and blue in the distance of two colours, nearer to what people see
OPACITY = 0.6


def colours(n: int) -> np.ndarray:
    """Return a colour for each of n classes, (n, 3) in uint8.

    Each colour is the farthest one from all before it, so the first colours differ most, and a class has the same
    colour whatever n is. Greys are left out.

    Raises:
        ValueError: n is larger than 255, the most classes that a mask can have.
    """
    if not 0 <= n <= IGNORED:
        raise ValueError(f"n={n}: a mask has 0 to {IGNORED} classes")
    return _all_colours()[:n].copy()


@functools.cache
def _all_colours() -> np.ndarray:
    candidates = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), -1).reshape(-1, 3)
    vivid = (np.ptp(candidates, 1) >= DULL) & (candidates.max(1) >= DARK)
    candidates = candidates[vivid]
    place = int(np.flatnonzero((candidates == (219, 36, 36)).all(1))[0])
    chosen, distances = [], np.full(len(candidates), np.iinfo(np.int64).max)
    for _ in range(IGNORED):
        chosen.append(place)
        differences = (candidates - candidates[place]) ** 2 @ np.array(WEIGHTS)
        distances = np.minimum(distances, differences)
        place = int(distances.argmax())  # integers: the same on every machine
    return candidates[chosen].astype(np.uint8)


def overlaid(image: Image.Image, mask: Image.Image, colours_of: np.ndarray, opacity: float = OPACITY) -> Image.Image:
    """Return an image in RGB with the colours of its mask's classes over it; ignored pixels stay as they are.

    Args:
        mask: in Pillow's mode "L", as large as the image.
        colours_of: (classes, 3) in uint8, from `colours`.
        opacity: from 0, where the colours cannot be seen, to 1, where the image cannot be seen.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours_of)] = colours_of
    classes_HW = np.asarray(mask)
    painted = Image.blend(image, Image.fromarray(table[classes_HW]), opacity)
    return Image.composite(painted, image, Image.fromarray((classes_HW < len(colours_of)).astype(np.uint8) * 255))
