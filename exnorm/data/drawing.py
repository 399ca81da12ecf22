"""Draw characters in random styles: the images of `glyphs` and `glyphs_web`.

The bytes of an image depend only on the font files and the seed. So random numbers come from `random.Random.random`,
the only stream that Python guarantees, and from SHAKE-128. Shapes move by whole pixels. The arithmetic is elementwise
in float32, which IEEE 754 defines to the last bit. Any change here needs another `VERSION`.

`python -m exnorm.data.drawing PLAN FILE OFFSET START STOP` draws the images START to STOP into a file, and ends when
its standard input closes.
"""

import functools
import hashlib
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from exnorm.runs.subprocesses import end_with_parent

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


def draw(plan: Plan, index: int) -> np.ndarray:
    """Return image `index` of a plan, (size, size, 3) in uint8."""
    digest = hashlib.blake2b(f"{plan.seed}/{index}".encode(), digest_size=16).digest()
    rng, style, size = random.Random(int.from_bytes(digest, "little")), plan.style, plan.size

    def uniform(span: Range) -> float:
        return span[0] + (span[1] - span[0]) * rng.random()

    text = plan.texts[index % len(plan.texts)]
    font = plan.fonts[int(rng.random() * len(plan.fonts))]
    height = uniform(style.height) * (0.62 if len(text) > 1 else 1)
    place = (uniform(style.shift), uniform(style.shift), uniform(style.shear), uniform(style.shear))
    shape = _character(text, font, max(6, round(size * height)), size, place)

    middle, half = uniform(style.brightness), uniform(style.contrast) * (0.5 if rng.random() < 0.5 else -0.5)
    casts = [uniform(style.cast) for _ in range(3)]
    texture = _texture(rng, size, digest) * np.float32(uniform(style.texture))
    levels = texture + np.float32(middle - half) + shape * (np.float32(2 * half) - texture)
    noise = np.frombuffer(hashlib.shake_128(digest).digest(size * size), np.uint8).reshape(size, size)
    levels = levels + (noise.astype(np.float32) / np.float32(255) - np.float32(0.5)) * np.float32(uniform(style.noise))
    channels = np.stack([levels * np.float32(1 + cast) for cast in casts], axis=-1)
    pixels = (np.clip(channels, 0, 1) * np.float32(255)).astype(np.uint8)

    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(uniform(style.blur) * size))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(uniform(style.quality)))
    return np.asarray(Image.open(file))


def _character(text: str, font: str, height: int, size: int, place: Sequence[float]) -> np.ndarray:
    """Return the share of each pixel that a character covers, (size, size) in float32."""
    dx, dy, shear_x, shear_y = place
    side = size * FINE
    canvas = Image.new("L", (side, side))
    face = _face(font, height * FINE)
    left, top, right, bottom = face.getbbox(text)
    at = (int(side * (0.5 + dx) - (left + right) / 2), int(side * (0.5 + dy) - (top + bottom) / 2))
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=face)
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


def _texture(rng: random.Random, size: int, digest: bytes) -> np.ndarray:
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


def draw_into(plan: Plan, file: Path, offset: int, start: int, stop: int) -> None:
    """Draw the images `start` to `stop` into a file in which image 0 begins at `offset` bytes."""
    with file.open("r+b") as target:
        target.seek(offset + start * plan.size * plan.size * 3)
        for index in range(start, stop):
            target.write(draw(plan, index).tobytes())


def main(arguments: Sequence[str]) -> None:
    """Run the command in the module's docstring."""
    end_with_parent()
    values, file, *numbers = arguments
    texts, fonts, style, size, seed = json.loads(values)
    draw_into(Plan(texts, fonts, Style(*map(tuple, style)), size, seed), Path(file), *map(int, numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
