"""What a data set is to the rest: labelled images that can be opened one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        open_image: returns image i as RGB.
        clean_labels: the labels before noise was added to them; None where none was.
    """

    labels: Sequence[int]
    open_image: Callable[[int], Image.Image]
    clean_labels: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes.

    Attributes:
        mistaken_for: for each class the one that asymmetric label noise makes of it; None for the next one.
    """

    train: Images
    val: Images
    classes: Sequence[str]
    mistaken_for: Sequence[int] | None = None
