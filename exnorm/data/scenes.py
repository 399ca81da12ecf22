"""Draw scenes: several characters in one image, with a mask that has a class for every pixel.

Each scene has one style, in the ranges of `exnorm.data.drawing.Style`. Each character has its own font, and is brighter
or darker than the background. As in that module, the bytes depend only on the font files and the seed, and any change
to them needs another `VERSION`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from exnorm.data.drawing import Style, character, photographed, seeded, texture, uniform
from exnorm.data.splits import IGNORED

VERSION = 1
BACKGROUND = 0  # the class of pixels without a digit
INSIDE, OUTSIDE = 0.5, 0.15  # coverage from which a pixel belongs to a character, and below which it does not
BOLDER = 0.03  # font sizes by which outlines move to the outside: thin strokes are lost at an output stride of 8
OVERLAP = 0.3  # the largest share of a character's pixels that another one may cover
TRIES = 50  # to place a character; fewer than 1 in 200 find no place in `glyph_scenes`, 1 in 50 in `glyph_streets`


class Plan(NamedTuple):
    """Scenes to draw. Scene i shows `texts[i % len(texts)]` and others, and has its own seed.

    Attributes:
        texts: characters; the mask has 1 where the first one is, 2 for the second, and so on.
        distractors: characters of the background class.
        fonts: paths of font files.
        style: its `height` is the font size divided by `size`; its `shift` is not used.
        size: pixels of a side.
        seed: a text that is different for each set.
        numbers: the least and the most of `texts` in a scene, then of `distractors`.
    """

    texts: Sequence[str]
    distractors: Sequence[str]
    fonts: Sequence[str]
    style: Style
    size: int
    seed: str
    numbers: Sequence[int] = (3, 6, 1, 2)


def shape(plan: Plan) -> tuple[int, ...]:
    """Return the shape of a scene of the plan."""
    return plan.size, plan.size, 4


def draw(plan: Plan, index: int) -> np.ndarray:
    """Return scene `index` of a plan, (size, size, 4) in uint8: the colour channels and the mask."""
    rng, digest = seeded(plan.seed, index)
    style, size = plan.style, plan.size
    contrast = uniform(rng, style.contrast)
    middle = visible_middle(uniform(rng, style.brightness), contrast)
    casts = [uniform(rng, style.cast) for _ in range(3)]
    background = texture(rng, size, digest) * np.float32(uniform(rng, style.texture)) + np.float32(middle)
    canvas = Canvas(np.stack([background] * 3, axis=-1), np.full((size, size), BACKGROUND, np.uint8))
    for text in _texts(rng, plan, index):
        covered = drawn_character(rng, text, plan.fonts, style, size, bolder=BOLDER)
        place = free_place(rng, covered >= INSIDE, canvas)
        if place is not None:
            level = middle + contrast * (1 if rng.random() < 0.5 else -1)
            label = plan.texts.index(text) + 1 if text in plan.texts else BACKGROUND
            paint(canvas, covered, place, [level] * 3, label)
    return np.dstack([photographed(canvas.levels_HWC, casts, style, rng, digest, side=size), canvas.mask_HW])


def visible_middle(brightness: float, contrast: float) -> float:
    """Return a brightness around which at least half of a contrast lies between black and white, to both sides."""
    return min(max(brightness, contrast / 2), 1 - contrast / 2)


def _texts(rng: random.Random, plan: Plan, index: int) -> list[str]:
    """Return the characters of a scene in a random order."""
    least, most, fewest_others, most_others = plan.numbers

    def chosen(of: Sequence[str], count: int) -> list[str]:
        return [of[int(rng.random() * len(of))] for _ in range(count)]

    texts = [plan.texts[index % len(plan.texts)]]
    texts += chosen(plan.texts, least - 1 + int(rng.random() * (most - least + 1)))
    texts += chosen(plan.distractors, fewest_others + int(rng.random() * (most_others - fewest_others + 1)))
    draws = [rng.random() for _ in texts]
    return [texts[position] for position in sorted(range(len(texts)), key=lambda position: draws[position])]


@dataclass
class Canvas:
    """A scene while it is drawn.

    Attributes:
        levels_HWC: intensities, float32.
        mask_HW: the class of each pixel, uint8.
        characters: for each character on it, which pixels it covers.
    """

    levels_HWC: np.ndarray
    mask_HW: np.ndarray
    characters: list[np.ndarray] = field(default_factory=list)


def drawn_character(
    rng: random.Random, text: str, fonts: Sequence[str], style: Style, side: int, *, bolder: float
) -> np.ndarray:
    """Return the share of each pixel that a character covers, in a random font, size and shear, without margins."""
    font = fonts[int(rng.random() * len(fonts))]
    height = max(6, round(side * uniform(rng, style.height)))
    shears = (uniform(rng, style.shear), uniform(rng, style.shear))
    covered = character(text, font, height, 2 * height, (0, 0, *shears), bolder=bolder)
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


Place = tuple[slice, slice]


def free_place(
    rng: random.Random, solid: np.ndarray, canvas: Canvas, *, centre_on: Sequence[int] | None = None
) -> Place | None:
    """Return a random place where at most `OVERLAP` of a character lies on earlier ones, and covers as little of each.

    Args:
        solid: the pixels of the character.
        centre_on: classes of which the mask has one at the character's centre.

    Returns:
        The rows and columns; None if no place was found in `TRIES` tries.
    """
    (height, width), (rows, columns) = solid.shape, canvas.mask_HW.shape
    pixels = [np.count_nonzero(other) for other in canvas.characters]
    for _ in range(TRIES):
        top, left = int(rng.random() * (rows - height + 1)), int(rng.random() * (columns - width + 1))
        if centre_on is not None and canvas.mask_HW[top + height // 2, left + width // 2] not in centre_on:
            continue
        place = np.s_[top : top + height, left : left + width]
        shared = [np.count_nonzero(solid & other[place]) for other in canvas.characters]
        hidden = any(count > OVERLAP * whole for count, whole in zip(shared, pixels, strict=True))
        if not hidden and sum(shared) <= OVERLAP * np.count_nonzero(solid):
            return place
    return None


def paint(canvas: Canvas, covered: np.ndarray, place: Place, colour: Sequence[float] | np.ndarray, label: int) -> None:
    """Draw a character over what is there, into the image and the mask."""
    share = covered[..., None]
    levels = canvas.levels_HWC[place]
    canvas.levels_HWC[place] = levels + share * (np.asarray(colour, np.float32) - levels)
    mask = canvas.mask_HW[place]
    canvas.mask_HW[place] = np.where(covered >= INSIDE, label, np.where(covered >= OUTSIDE, IGNORED, mask))
    whole = np.zeros(canvas.mask_HW.shape, bool)
    whole[place] = covered >= INSIDE
    canvas.characters.append(whole)
