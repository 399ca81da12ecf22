"""Draw streets: bands of texture from the sky to the road, with characters on them, and a mask of both.

Each class of bands has its own texture and place. Its colour depends on the city, so colours learned in one city do not
help in another. Each class of objects is one letter, whose centre lies on certain bands. Each image has one style, in
the ranges of `exnorm.data.drawing.Style`. As in that module, the bytes depend only on the font files and the seed, and
any change to them needs another `VERSION`.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from exnorm.data.drawing import Style, photographed, seeded, uniform
from exnorm.data.scenes import INSIDE, Canvas, drawn_character, free_place, paint, visible_middle

VERSION = 1
BANDS = ("road", "sidewalk", "building", "fence", "vegetation", "sky")
ROAD, SIDEWALK, BUILDING, FENCE, VEGETATION, SKY = range(len(BANDS))
MIDDLE_BANDS = (BUILDING, FENCE, VEGETATION)
# The usual colour of each band. Its value is 0 at the brightness of the image and 1 a full contrast above it.
COLOURS = (
    *((-0.4, -0.4, -0.3), (0.2, 0.1, 0.1), (0.1, -0.1, -0.2), (-0.1, -0.1, 0.1)),
    *((-0.3, 0.2, -0.4), (0.5, 0.6, 0.8)),
)
SHIFT, TINT = 0.5, 0.4  # how far a city's colours depart from the usual ones, in all channels alike and in each of them


class Object(NamedTuple):
    """A class of objects.

    Attributes:
        text: the character that is drawn.
        size: a factor on the character's height.
        bands: on one of them is the object's centre.
    """

    text: str
    size: float
    bands: Sequence[int]


OBJECTS = {
    "sign": Object("S", 0.7, (*MIDDLE_BANDS, SKY)),
    "person": Object("P", 0.8, (SIDEWALK, BUILDING, FENCE)),
    "car": Object("C", 1.0, (ROAD,)),
    "bicycle": Object("B", 0.8, (ROAD, SIDEWALK)),
}
CLASSES = (*BANDS, *OBJECTS)
MIN_OBJECTS, MAX_OBJECTS = 3, 6
BOLDER = 0.06  # moves a letter's outline to the outside, in font sizes


class Plan(NamedTuple):
    """Streets to draw. Street i shows the object i % 4 and others, and has its own seed.

    Attributes:
        cities: names, each with its own colours.
        fonts: paths of font files.
        style: its `height` is the font size divided by the image's height, for a car; its `shift` is not used.
        height, width: pixels.
        seed: a text that is different for each set.
    """

    cities: Sequence[str]
    fonts: Sequence[str]
    style: Style
    height: int
    width: int
    seed: str


def shape(plan: Plan) -> tuple[int, ...]:
    """Return the shape of a street of the plan."""
    return plan.height, plan.width, 4


def draw(plan: Plan, index: int) -> np.ndarray:
    """Return street `index` of a plan, (height, width, 4) in uint8: the colour channels and the mask."""
    rng, digest = seeded(plan.seed, index)
    style = plan.style
    city = plan.cities[int(rng.random() * len(plan.cities))]
    contrast = uniform(rng, style.contrast)
    middle = visible_middle(uniform(rng, style.brightness), contrast)
    casts = [uniform(rng, style.cast) for _ in range(3)]
    mask_HW = layout(rng, digest, plan.height, plan.width)
    colours = np.float32(middle) + np.float32(contrast) * palette(city)
    levels_HWC = colours[mask_HW] + textures(rng, digest, mask_HW)[..., None] * np.float32(uniform(rng, style.texture))
    canvas = Canvas(levels_HWC, mask_HW)
    for name in _objects(rng, index):
        _add(canvas, rng, name, plan, colours, contrast)
    return np.dstack([photographed(canvas.levels_HWC, casts, style, rng, digest, side=plan.height), canvas.mask_HW])


def palette(city: str) -> np.ndarray:
    """Return the colours of a city's bands, (bands, 3) in float32, in the units of `COLOURS`."""
    found = np.frombuffer(hashlib.shake_128(city.encode()).digest(4 * len(BANDS)), np.uint8).reshape(-1, 4)
    shifts = found.astype(np.float32) / np.float32(127.5) - np.float32(1)
    usual = np.array(COLOURS, np.float32)
    return usual + np.float32(SHIFT) * shifts[:, :1] + np.float32(TINT) * shifts[:, 1:]


def layout(rng: random.Random, digest: bytes, height: int, width: int) -> np.ndarray:
    """Return the band of each pixel, (height, width) in uint8."""
    rows, columns = np.mgrid[:height, :width]
    skyline = height * (uniform(rng, (0.18, 0.36)) + 0.3 * _wave(digest, "skyline", width))
    wall = height * (uniform(rng, (0.48, 0.6)) + 0.15 * _wave(digest, "wall", width))
    kerb = wall + height * (uniform(rng, (0.1, 0.22)) + 0.12 * _wave(digest, "kerb", width))
    segments = 3 + int(rng.random() * 3)
    cuts = [width * (number + uniform(rng, (-0.3, 0.3))) / segments for number in range(1, segments)]
    edges = [cut + 12 * _wave(digest, f"cut {number}", height)[:, None] for number, cut in enumerate(cuts)]
    segment = sum((columns >= edge).astype(np.int64) for edge in edges)
    first, step = int(rng.random() * 3), 1 + int(rng.random() * 2)
    mask = np.array(MIDDLE_BANDS)[(first + step * segment) % len(MIDDLE_BANDS)]
    mask = np.where(rows < skyline, SKY, np.where(rows < wall, mask, np.where(rows < kerb, SIDEWALK, ROAD)))
    return mask.astype(np.uint8)


def textures(rng: random.Random, digest: bytes, mask_HW: np.ndarray) -> np.ndarray:
    """Return from -0.5 to 0.5 what each pixel adds to the colour of its band, in float32."""
    height, width = mask_HW.shape
    rows, columns = np.mgrid[:height, :width]

    def between(low: int, high: int) -> int:
        return low + int(rng.random() * (high - low + 1))

    def halves(pattern: np.ndarray) -> np.ndarray:
        return pattern.astype(np.float32) - np.float32(0.5)

    storey, window, post, slab = between(6, 12), between(5, 10), between(4, 8), between(3, 6)
    by_band = {
        ROAD: _smooth(digest + b"road", (height // 3, width // 24), (height, width)),  # streaks
        SIDEWALK: halves((rows // (slab // 2) + columns // slab) % 2),  # slabs
        BUILDING: halves((rows % storey < storey // 2) & (columns % window < window // 2)),  # windows
        FENCE: halves(columns % post < post // 2),  # posts
        VEGETATION: _smooth(digest + b"vegetation", (height // 5, width // 5), (height, width)),  # leaves
        SKY: _smooth(digest + b"sky", (3, 4), (height, width)),  # clouds
    }
    return np.choose(mask_HW, [by_band[band] for band in range(len(BANDS))])


def _smooth(digest: bytes, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return random values from -0.5 to 0.5 in cells, interpolated to a size, in float32."""
    coarse = np.frombuffer(hashlib.shake_128(digest).digest(cells[0] * cells[1]), np.uint8).reshape(cells)
    fine = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(fine).astype(np.float32) / np.float32(255) - np.float32(0.5)


def _wave(digest: bytes, name: str, length: int) -> np.ndarray:
    """Return a wavy line from -0.5 to 0.5, (length,) in float32."""
    return _smooth(digest + name.encode(), (1, max(2, length // 20)), (1, length))[0]


def _objects(rng: random.Random, index: int) -> list[str]:
    """Return the objects of a street."""
    names = list(OBJECTS)
    more = MIN_OBJECTS - 1 + int(rng.random() * (MAX_OBJECTS - MIN_OBJECTS + 1))
    return [names[index % len(names)], *(names[int(rng.random() * len(names))] for _ in range(more))]


def _add(canvas: Canvas, rng: random.Random, name: str, plan: Plan, colours: np.ndarray, contrast: float) -> None:
    """Draw an object, brighter or darker than the band behind its centre; leave it out if there is no place for it."""
    kind = OBJECTS[name]
    height = (plan.style.height[0] * kind.size, plan.style.height[1] * kind.size)
    style = plan.style._replace(height=height)
    covered = drawn_character(rng, kind.text, plan.fonts, style, plan.height, bolder=BOLDER)
    place = free_place(rng, covered >= INSIDE, canvas, centre_on=kind.bands)
    sign = 1 if rng.random() < 0.5 else -1
    if place is None:
        return
    rows, columns = place
    behind = colours[canvas.mask_HW[(rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2]]
    if abs(behind[1] + sign * contrast - 0.5) > 0.5 + contrast / 2:
        sign = -sign  # it would be as white or black as the band
    paint(canvas, covered, place, behind + np.float32(sign * contrast), CLASSES.index(name))
