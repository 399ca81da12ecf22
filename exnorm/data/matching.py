"""Data sets over each other's classes, matched by name: for ImageNet and WebVision, by WordNet id."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.splits import Images, Splits

SHOWN = 3  # of the classes that differ


def matched(splits: Splits, classes: Sequence[str], *, name: str) -> Splits:
    """The images of these classes, labelled in their order; images of other classes are left out.

    Args:
        name: of the data set, for the error.

    Raises:
        UserError: a class that the set lacks.
    """
    if list(splits.classes) == list(classes):
        return splits
    positions = {label: index for index, label in enumerate(classes)}
    own = set(splits.classes)
    lacking = [label for label in classes if label not in own]
    if lacking:
        others = [label for label in splits.classes if label not in positions]
        raise UserError(
            f"data={name} has {len(splits.classes)} classes, and {len(lacking)} of the run's {len(classes)} are not "
            f"among them, such as {', '.join(lacking[:SHOWN])}"
            + (f"; it has {', '.join(others[:SHOWN])} instead" if others else "")
        )
    new_labels = [positions.get(label) for label in splits.classes]
    return Splits(_relabelled(splits.train, new_labels), _relabelled(splits.val, new_labels), classes)


def _relabelled(images: Images, new_labels: Sequence[int | None]) -> Images:
    """Images with a new label for each old class, by their clean label; those of classes without are left out."""
    clean = images.labels if images.clean_labels is None else images.clean_labels
    pairs = [(index, label) for index, old in enumerate(clean) if (label := new_labels[old]) is not None]
    kept, labels = [index for index, _ in pairs], [label for _, label in pairs]
    return replace(images, labels=labels, open_image=partial(_open, images, kept), clean_labels=None)


def _open(images: Images, kept: Sequence[int], index: int) -> Image.Image:
    return images.open_image(kept[index])
