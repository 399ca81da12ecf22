"""Draw characters in random styles: the images of `glyphs` and `glyphs_web`.

The bytes of an image depend only on the font files and the seed. So random numbers come from `random.Random.random`,
the only stream that Python guarantees, and from SHAKE-128. Shapes move by whole pixels. The arithmetic is elementwise
in float32, which IEEE 754 defines to the last bit. Any change to the bytes needs another `VERSION`, here and in the
modules that draw with these functions (`exnorm.data.scenes`, `exnorm.data.streets`).
"""

import functools
import hashlib
import io
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

VERSION = 1
FINE = 2  # a character is drawn and sheared at this multiple of the resolution
Range = tuple[float, float]


class Style(NamedTuple):
    """The ranges of what varies between images, each uniformly; intensities go from 0 to 1.

    Attributes:
        height: the font size divided by the image's side, for one character; a pair is smaller.
        shift: of the centre, divided by the image's side.
        shear: horizontal and vertical; both together rotate and slant.
        contrast: between character and background; it is random which of them is brighter.
        brightness: the mean of the two.
        cast: how far a colour channel departs from grey.
        texture: the amplitude of the background's gradient, stripes or blotches.
        noise: the amplitude of the noise in each pixel.
        blur: the radius divided by the image's side.
        quality: of the JPEG compression.
    """

    height: Range = (0.55, 0.95)
    shift: Range = (-0.12, 0.12)
    shear: Range = (-0.25, 0.25)
    contrast: Range = (0.08, 0.6)
    brightness: Range = (0.15, 0.85)
    cast: Range = (-0.2, 0.2)
    texture: Range = (0.0, 0.4)
    noise: Range = (0.0, 0.35)
    blur: Range = (0.0, 0.03)
    quality: Range = (15, 90)


class Plan(NamedTuple):
    """Images to draw. Image i shows `texts[i % len(texts)]` in one of the fonts and has its own seed.

    Attributes:
        fonts: paths of font files.
        size: pixels of a side.
        seed: a text that is different for each set.
    """

    texts: Sequence[str]
    fonts: Sequence[str]
    style: Style
    size: int
    seed: str


def style_of(values: Sequence[Any]) -> Style:
    """Return a style that was written as JSON."""
    return Style(*map(tuple, values))


def shape(plan: Plan) -> tuple[int, ...]:
    """Return the shape of an image of the plan."""
    return plan.size, plan.size, 3


def draw(plan: Plan, index: int) -> np.ndarray:
    """Return image `index` of a plan, (size, size, 3) in uint8."""
    rng, digest = seeded(plan.seed, index)
    style, size = plan.style, plan.size
    text = plan.texts[index % len(plan.texts)]
    font = plan.fonts[int(rng.random() * len(plan.fonts))]
    height = uniform(rng, style.height) * (0.62 if len(text) > 1 else 1)
    place = [uniform(rng, span) for span in (style.shift, style.shift, style.shear, style.shear)]
    covered = character(text, font, max(6, round(size * height)), size, place)

    middle = uniform(rng, style.brightness)
    half = uniform(rng, style.contrast) * (0.5 if rng.random() < 0.5 else -0.5)
    casts = [uniform(rng, style.cast) for _ in range(3)]
    background = texture(rng, size, digest) * np.float32(uniform(rng, style.texture))
    levels = background + np.float32(middle - half) + covered * (np.float32(2 * half) - background)
    return photographed(np.stack([levels] * 3, axis=-1), casts, style, rng, digest, side=size)


def seeded(seed: str, index: int) -> tuple[random.Random, bytes]:
    """Return the random numbers of an image, and bytes from which SHAKE-128 makes more of them."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little")), digest


def uniform(rng: random.Random, span: Range) -> float:
    """Return a random number from a range."""
    return span[0] + (span[1] - span[0]) * rng.random()


def photographed(
    levels_HWC: np.ndarray, casts: Sequence[float], style: Style, rng: random.Random, digest: bytes, *, side: int
) -> np.ndarray:
    """Return intensities as pixels in uint8, after noise, colour cast, blur and JPEG compression.

    Args:
        casts: how far each colour channel departs from grey.
        side: the number of pixels by which `style.blur` is multiplied.
    """
    height, width, _ = levels_HWC.shape
    noise = np.frombuffer(hashlib.shake_128(digest).digest(height * width), np.uint8).reshape(height, width, 1)
    centred = noise.astype(np.float32) / np.float32(255) - np.float32(0.5)
    levels_HWC = levels_HWC + centred * np.float32(uniform(rng, style.noise))
    channels = levels_HWC * np.array([1 + cast for cast in casts], np.float32)
    pixels = (np.clip(channels, 0, 1) * np.float32(255)).astype(np.uint8)

    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(uniform(rng, style.blur) * side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(uniform(rng, style.quality)))
    return np.asarray(Image.open(file))


def character(
    text: str, font: str, height: int, size: int, place: Sequence[float], *, bolder: float = 0.0
) -> np.ndarray:
    """Return the share of each pixel that a character covers, (size, size) in float32.

    Args:
        height: the font size.
        place: horizontal and vertical shift of the centre, divided by `size`, and the two shears.
        bolder: by what its outline moves to the outside, divided by the font size.
    """
    dx, dy, shear_x, shear_y = place
    side = size * FINE
    canvas = Image.new("L", (side, side))
    face = _face(font, height * FINE)
    left, top, right, bottom = face.getbbox(text)
    at = (int(side * (0.5 + dx) - (left + right) / 2), int(side * (0.5 + dy) - (top + bottom) / 2))
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=face, stroke_width=round(height * FINE * bolder))
    fine = _sheared(_sheared(np.asarray(canvas), shear_x).T, shear_y).T
    covered = fine.reshape(size, FINE, size, FINE).sum((1, 3), dtype=np.int32)
    return covered.astype(np.float32) / np.float32(255 * FINE * FINE)


def _sheared(image: np.ndarray, shear: float) -> np.ndarray:
    """Shift each row by whole pixels, in proportion to its distance from the middle; pixels that leave are lost."""
    side = len(image)
    steps = np.array([int((row - side / 2) * shear) for row in range(side)])
    columns = np.arange(side)[None] - steps[:, None]
    inside = (columns >= 0) & (columns < side)
    return np.where(inside, image[np.arange(side)[:, None], columns % side], 0)


def texture(rng: random.Random, size: int, digest: bytes) -> np.ndarray:
    """Return a background from -0.5 to 0.5: a gradient, stripes or blotches."""
    kind = int(rng.random() * 3)
    a, b = rng.random() * 2 - 1, rng.random() * 2 - 1
    rows, columns = np.mgrid[:size, :size]
    if kind == 0:
        gradient = rows.astype(np.float32) * np.float32(a) + columns.astype(np.float32) * np.float32(b)
        low, high = gradient.min(), gradient.max()
        return (gradient - low) / (high - low) - np.float32(0.5)
    if kind == 1:
        period = max(2, round(size * (0.08 + 0.25 * abs(a))))
        waves = (rows * round(8 * a) + columns * round(8 * b)) // 4 % period
        return (waves < period // 2).astype(np.float32) - np.float32(0.5)
    cells = 3 + int(6 * abs(a))
    coarse = np.frombuffer(hashlib.shake_128(digest + b"blotches").digest(cells * cells), np.uint8)
    fine = Image.fromarray(coarse.reshape(cells, cells)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(fine).astype(np.float32) / np.float32(255) - np.float32(0.5)


@functools.cache
def _face(font: str, height: int) -> Any:
    return ImageFont.truetype(font, height, layout_engine=ImageFont.Layout.BASIC)
