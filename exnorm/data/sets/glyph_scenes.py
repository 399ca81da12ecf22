"""Scenes of glyphs: digits in front of textures, with a mask of them. They are drawn, not downloaded.

The set stands in for semantic segmentation on a laptop. A scene of 96 px has 3 to 6 digits of about 16 to 40 px, and 1
or 2 letters that belong to the background. Contrast, brightness, colour cast, background, noise, blur and compression
vary between images as strongly as in `glyphs`. Validation uses the fonts that `glyphs` validates on.

`resnet_mini` learns it slowly from random weights. The studies begin with the backbone of a run on `glyphs`.
"""

from collections.abc import Sequence
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import rendered
from exnorm.data.drawing import Style
from exnorm.data.scenes import Plan
from exnorm.data.sets import glyphs
from exnorm.data.splits import NO_MASKED_IMAGES, Splits

SIZE = 96  # px
DIGITS, LETTERS = list(glyphs.SINGLES[:10]), list(glyphs.PAIRED[10:])
CLASSES = ("background", *DIGITS)
STYLE = Style(height=(0.24, 0.6), blur=(0.0, 0.01))  # a digit is about 0.7 of its font size high


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of everything that determines a pixel: fonts, styles, numbers and seed."""
    return glyphs.fingerprint_of(*plans(config), config)


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits, drawn now or read from the cache."""
    return splits(*plans(config), CLASSES, config, with_train=train)


def plans(config: Any) -> tuple[Plan, Plan]:
    """Return the plans of the training and the validation images.

    Raises:
        UserError: an option has a wrong value.
    """
    check(config)
    train, val = (
        Plan(DIGITS, LETTERS, glyphs.font_files(fonts), STYLE, SIZE, f"{config.name}/{split}/{config.seed}")
        for split, fonts in (("train", glyphs.TRAIN_FONTS), ("val", glyphs.VAL_FONTS))
    )
    return train, val


def check(config: Any) -> None:
    """Check the options of a drawn set with masks.

    Raises:
        UserError: an option has a wrong value.
    """
    glyphs.refuse_folder(config)
    for name in ("num_train", "num_val"):
        if getattr(config, name) < 1:
            raise UserError(f"data.{name}={getattr(config, name)}: give 1 image or more")


def splits(train: Any, val: Any, classes: Sequence[str], config: Any, *, with_train: bool) -> Splits:
    """Return the images and masks of both plans."""
    train_images = rendered.masked_images(train, config.num_train) if with_train else NO_MASKED_IMAGES
    return Splits(train_images, rendered.masked_images(val, config.num_val), classes)
