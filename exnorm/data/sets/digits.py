"""UCI handwritten digits: 1,797 real scans of 8 x 8 pixels in 10 classes, shipped inside scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998. A random
fifth, the same for every seed of a run, is held out for validation.
"""

import hashlib
import importlib.util
import random
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.splits import Images, Splits

HELD_OUT = 5  # one in five
SPLIT_SEED = 0
MAX_VALUE = 16  # of a pixel in the scans


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the file inside scikit-learn."""
    if config.root is not None:
        raise UserError(f"data.root={config.root}: digits come with scikit-learn and take no folder. Leave it out")
    return hashlib.sha256(scans_file().read_bytes()).hexdigest()


def scans_file() -> Path:
    """Return the file inside scikit-learn: a row for each scan, its 64 pixels and its label."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError("data=digits needs scikit-learn. Type pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def load(config: Any, *, train: bool = True) -> Splits:
    """Return the scans: four fifths for training and one fifth for validation."""
    import numpy as np

    table = np.loadtxt(scans_file(), delimiter=",")  # load_digits reads the same, but its import takes a second
    pixels, labels = table[:, :-1], table[:, -1].astype(int)
    scans = (pixels.reshape(-1, 8, 8) * (255 / MAX_VALUE)).round().astype("uint8")
    order = list(range(len(labels)))
    random.Random(SPLIT_SEED).shuffle(order)
    cut = len(order) // HELD_OUT
    held_out, others = sorted(order[:cut]), sorted(order[cut:])
    return Splits(
        _subset(scans, labels, others),
        _subset(scans, labels, held_out),
        [str(digit) for digit in range(10)],
    )


def _subset(scans: Any, labels: Any, indices: list[int]) -> Images:
    return Images([int(label) for label in labels[indices]], partial(_open, scans[indices]))


def _open(scans: Any, index: int) -> Image.Image:
    return Image.fromarray(scans[index]).convert("RGB")
