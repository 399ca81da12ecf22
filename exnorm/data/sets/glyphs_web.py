"""Glyphs from the web: the classes of `glyphs` in other fonts and another style, with wrong labels in training.

A fifth of the training labels are wrong (`data.noise`), but not at random: a wrong label is the class that the true one
is most easily mistaken for, such as 3 and 8. Validation has clean labels and other fonts than training.
"""

from typing import Any

from exnorm.data.drawing import Style
from exnorm.data.sets import glyphs
from exnorm.data.splits import Splits

TRAIN_FONTS = (
    *("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneralBol", "STIXGeneralItalic", "cmtt10"),
)
VAL_FONTS = ("DejaVuSansMono-BoldOblique", "STIXGeneralBolIta", "cmb10", "cmti10")
STYLE = Style(
    height=(0.4, 1.0),
    shift=(-0.16, 0.16),
    contrast=(0.15, 1.0),
    cast=(-0.45, 0.45),
    texture=(0.1, 0.45),
    noise=(0.0, 0.15),
    quality=(8, 60),
)


def fingerprint(config: Any, *, train: bool = True) -> str:
    """See `exnorm.data.sets.glyphs.fingerprint`."""
    return glyphs.fingerprint_of(*glyphs.plans(config, STYLE, TRAIN_FONTS, VAL_FONTS), config)


def load(config: Any, *, train: bool = True) -> Splits:
    """See `exnorm.data.sets.glyphs.load`."""
    return glyphs.splits(*glyphs.plans(config, STYLE, TRAIN_FONTS, VAL_FONTS), config, with_train=train)
