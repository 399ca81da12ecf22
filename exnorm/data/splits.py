"""The form of a loaded data set: images with their targets, a label or a mask, that are opened one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError

Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        open_image: returns image i as RGB; raises `files.BadImage` where its file is broken.
        read_pixels: returns the images with these indices as (images, height, width, 3) in uint8. None if they are not
            decoded yet, or have different sizes.
        name_of: returns the path of image i from the folder of its split, without the name of a tar file; None for
            images without files.
        clean_labels: the labels before noise was added to them; None without noise.
        excluded: the number of images that the user left out.
        of_other_classes: the number of images left out because the run does not have their class.
    """

    labels: Labels
    open_image: Callable[[int], Image.Image]
    read_pixels: Callable[[np.ndarray], np.ndarray] | None = None
    name_of: Callable[[int], str] | None = None
    clean_labels: Labels | None = None
    excluded: int = 0
    of_other_classes: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> tuple[Image.Image, int, int]:
        """Return image i in RGB, its label, and its label before noise was added.

        Raises:
            BadImage: its file is broken.
        """
        return self.open_image(index), *self.labels_of(index)

    def labels_of(self, index: int) -> tuple[int, int]:
        """Return the label of image i, and its label before noise was added."""
        clean = self.labels if self.clean_labels is None else self.clean_labels
        return int(self.labels[index]), int(clean[index])

    def replacements(self, index: int) -> np.ndarray:
        """Return the images that may replace a broken one: those of its label, the next ones first."""
        alike = np.flatnonzero(np.asarray(self.labels) == self.labels[index])
        first = int(np.searchsorted(alike, index, side="right"))
        return np.concatenate([alike[first:], alike[:first]])[:-1]

    def described(self, index: int) -> str:
        """Return the words for the images that may replace an image and itself."""
        return f"images of label {self.labels[index]}"


@dataclass(frozen=True)
class MaskedImages:
    """Images with a class for every pixel.

    Attributes:
        count: the number of images.
        open_image: returns image i as RGB; raises `files.BadImage` where its file is broken.
        open_mask: returns the mask of image i, as large as the image, in Pillow's mode "L": the class of each pixel, or
            IGNORED. Raises `files.BadImage` where it is broken, and UserError for a value that is no class.
        same_size: all images have the same size, so that several can be tested at once.
        excluded: the number of images that the user left out.
    """

    count: int
    open_image: Callable[[int], Image.Image]
    open_mask: Callable[[int], Image.Image]
    same_size: bool = False
    excluded: int = 0
    of_other_classes: int = 0

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return image i in RGB and its mask.

        Raises:
            BadImage: one of the two files is broken.
            UserError: the mask has a value that is no class.
        """
        return self.open_image(index), self.open_mask(index)

    def replacements(self, index: int) -> np.ndarray:
        """Return the images that may replace a broken one: all others, the next ones first."""
        return np.roll(np.arange(self.count), -index)[1:]

    def described(self, index: int) -> str:
        """Return the words for the images that may replace an image and itself."""
        return "images"


IGNORED = 255  # the value of a mask's pixels that belong to no class; they are neither trained on nor scored


def _none(index: int) -> Image.Image:
    raise IndexError(index)


NO_IMAGES = Images([], _none)
NO_MASKED_IMAGES = MaskedImages(0, _none, _none)


Samples = Images | MaskedImages


def labelled(images: Samples, *, what: str) -> Images:
    """Return images that have labels.

    Args:
        what: what needs them, for the error message.

    Raises:
        UserError: they have masks.
    """
    if isinstance(images, MaskedImages):
        raise UserError(f"{what} needs a label for each image, and this data set has masks")
    return images


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes.

    Attributes:
        train: empty if only validation was loaded.
        mistaken_for: for each class, the one that asymmetric label noise changes it to; None for the next class.
    """

    train: Samples
    val: Samples
    classes: Sequence[str]
    mistaken_for: Sequence[int] | None = None
