"""The form of a loaded data set: labelled images that are opened one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        open_image: returns image i as RGB; raises `files.BadImage` where its file is broken.
        clean_labels: the labels before noise was added to them; None without noise.
        excluded: the number of images that the user left out.
        of_other_classes: the number of images left out because the run does not have their class.
    """

    labels: Labels
    open_image: Callable[[int], Image.Image]
    clean_labels: Labels | None = None
    excluded: int = 0
    of_other_classes: int = 0

    def __len__(self) -> int:
        return len(self.labels)


def _none(index: int) -> Image.Image:
    raise IndexError(index)


NO_IMAGES = Images([], _none)


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes.

    Attributes:
        train: empty if only validation was loaded.
        mistaken_for: for each class, the one that asymmetric label noise changes it to; None for the next class.
    """

    train: Images
    val: Images
    classes: Sequence[str]
    mistaken_for: Sequence[int] | None = None
