"""Glyphs: characters in the fonts that matplotlib ships, each image in its own style. They are drawn, not downloaded.

Contrast, brightness, colour cast, background, noise, blur and compression vary strongly between images. This variation
is the subject of sample-wise normalization. Validation uses other fonts than training. The first 10 classes are the
digits, then letters and symbols up to 52, then pairs of them up to 1,000. `glyphs` stands in for ImageNet,
`glyphs_web` for WebVision.

Difficulty: at the studies' scale mini (`conf/scale/mini.yaml`) BN reaches 87 % on the 10 classes. With an output stride
of 32 in `resnet_mini` it reached 86 %. In an earlier version with more contrast (to 0.9), less texture (to 0.3) and
less noise (to 0.25) it reached 93 %.
"""

import hashlib
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import rendered
from exnorm.data.drawing import Plan, Style, draw
from exnorm.data.splits import NO_IMAGES, Splits

# No two of these look alike in all fonts (0 and O, 1 and I and l would), and cm fonts draw each of them.
SINGLES = "0123456789" + "ABCDEFGHJKLMNPQRSTUVWXYZ" + "abdefghnqrt" + "#%&+=?@"
PAIRED = SINGLES[:34]
MIN_CLASSES, MAX_CLASSES = 10, 1000
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "cmss10"),
)
VAL_FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "cmr10")
STYLE = Style()


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of everything that determines a pixel: fonts, styles, classes, numbers and seed."""
    return fingerprint_of(*plans(config, STYLE, TRAIN_FONTS, VAL_FONTS), config)


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits, drawn now or read from the cache."""
    return splits(*plans(config, STYLE, TRAIN_FONTS, VAL_FONTS), config, with_train=train)


def class_names(count: int) -> list[str]:
    """Return the text of each class: the single characters, then the pairs in a mixed, fixed order."""
    pairs = ["".join(pair) for pair in permutations(PAIRED, 2)]
    pairs.sort(key=lambda pair: hashlib.sha256(pair.encode()).digest())
    return [*SINGLES, *pairs][:count]


def plans(config: Any, style: Style, train_fonts: Sequence[str], val_fonts: Sequence[str]) -> tuple[Plan, Plan]:
    """Return the plans of the training and the validation images.

    Raises:
        UserError: an option has a wrong value.
    """
    _check(config)
    texts = class_names(config.num_classes)
    train, val = (
        Plan(texts, font_files(fonts), style, config.image_size, f"{config.name}/{split}/{config.seed}")
        for split, fonts in (("train", train_fonts), ("val", val_fonts))
    )
    return train, val


def _check(config: Any) -> None:
    refuse_folder(config)
    if not MIN_CLASSES <= config.num_classes <= MAX_CLASSES:
        raise UserError(
            f"data.num_classes={config.num_classes}: {config.name} has {MIN_CLASSES} to {MAX_CLASSES} classes"
        )
    for name in ("num_train", "num_val"):
        if getattr(config, name) < config.num_classes:
            raise UserError(f"data.{name}={getattr(config, name)}: give at least one image per class")


def refuse_folder(config: Any) -> None:
    """Raise UserError if a drawn set was given a folder."""
    if config.root is not None:
        raise UserError(f"data.root={config.root}: {config.name} are drawn and take no folder. Leave it out")


def font_files(names: Sequence[str]) -> list[str]:
    """Return the paths of fonts that matplotlib ships."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [str(folder / f"{name}.ttf") for name in names]


def fingerprint_of(train: Any, val: Any, config: Any) -> str:
    """Return both plans' fingerprints as one text."""
    return rendered.fingerprint(train, config.num_train) + rendered.fingerprint(val, config.num_val)


def splits(train: Plan, val: Plan, config: Any, *, with_train: bool) -> Splits:
    """Return the images of both plans, and for each class the one that it is most easily mistaken for."""
    train_images = rendered.images(train, config.num_train) if with_train else NO_IMAGES
    return Splits(train_images, rendered.images(val, config.num_val), list(train.texts), mistaken_for(train))


def mistaken_for(plan: Plan) -> list[int]:
    """Return for each class the one whose plainly drawn character differs least from its own."""
    plain = Style(*[(0.0, 0.0)] * len(Style._fields))._replace(
        height=(0.9, 0.9), contrast=(1.0, 1.0), brightness=(0.5, 0.5), blur=(0.06, 0.06), quality=(95, 95)
    )
    reference = plan._replace(fonts=plan.fonts[:1], style=plain, size=16, seed="plain")
    drawn = np.stack([draw(reference, index) for index in range(len(plan.texts))]).astype(np.int64)[..., 0]
    # It is random whether the character or the background is brighter. The corner shows the background.
    shapes = np.abs(drawn - drawn[:, :1, :1]).reshape(len(drawn), -1)
    distances = [np.abs(shapes - shape).sum(1) for shape in shapes]
    for label, row in enumerate(distances):
        row[label] = np.iinfo(np.int64).max
    return [int(row.argmin()) for row in distances]
