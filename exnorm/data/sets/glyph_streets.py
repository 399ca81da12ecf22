"""Streets of glyphs: bands of texture and letters on them, with masks. They are drawn, not downloaded.

The set stands in for Cityscapes on a laptop. An image of 96 x 192 px has bands such as sky, building and road, and 3 to
6 objects, each a letter: S for a sign, P for a person, C for a car, B for a bicycle. Each city has its own colours. As
in Cityscapes, validation shows other cities than training, and the letters have other fonts there.
"""

from typing import Any

from exnorm.data.drawing import Style
from exnorm.data.sets import glyph_scenes, glyphs
from exnorm.data.splits import Splits
from exnorm.data.streets import CLASSES, Plan

HEIGHT, WIDTH = 96, 192  # px
TRAIN_CITIES = [f"city {number}" for number in range(18)]
VAL_CITIES = [f"city {number}" for number in range(18, 24)]
STYLE = Style(height=(0.34, 0.6), texture=(0.1, 0.4), blur=(0.0, 0.01))  # a letter is about 0.7 of its font size high


def fingerprint(config: Any, *, train: bool = True) -> str:
    """See `exnorm.data.sets.glyph_scenes.fingerprint`."""
    return glyphs.fingerprint_of(*plans(config), config)


def load(config: Any, *, train: bool = True) -> Splits:
    """See `exnorm.data.sets.glyph_scenes.load`."""
    return glyph_scenes.splits(*plans(config), CLASSES, config, with_train=train)


def plans(config: Any) -> tuple[Plan, Plan]:
    """Return the plans of the training and the validation images.

    Raises:
        UserError: an option has a wrong value.
    """
    glyph_scenes.check(config)
    train, val = (
        Plan(cities, glyphs.font_files(fonts), STYLE, HEIGHT, WIDTH, f"{config.name}/{split}/{config.seed}")
        for split, cities, fonts in (
            ("train", TRAIN_CITIES, glyphs.TRAIN_FONTS),
            ("val", VAL_CITIES, glyphs.VAL_FONTS),
        )
    )
    return train, val
