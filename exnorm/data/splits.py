"""What a data set is to the rest: labelled images that can be opened one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Images:
    """Labelled images; `open_image(i)` returns image i as RGB."""

    labels: Sequence[int]
    open_image: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes."""

    train: Images
    val: Images
    classes: Sequence[str]
