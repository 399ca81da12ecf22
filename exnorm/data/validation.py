"""Validation on other data sets, with the crops and the classes of the run.

Classes are matched by name: for ImageNet and WebVision, by WordNet id.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from exnorm.config.compose import CROPS
from exnorm.config.errors import UserError
from exnorm.config.groups import option_values
from exnorm.config.schema import DataConfig
from exnorm.data.splits import IGNORED, Images, MaskedImages, Splits

SHOWN = 3  # of the classes that differ
TAKEN = (*CROPS, "workers", "roots", "exclude", "cache")  # copied from the run's own set
DRAWN = ("num_classes", "num_val", "seed")


def others(config: Any) -> dict[str, Any]:
    """Return the configuration of each other set in `data.val`, by its name: its own, with the run's crops.

    Raises:
        UserError: a name is unknown or is given twice.
    """
    names = config.val or []
    if len(set(names)) < len(names):
        raise UserError(f"data.val={list(names)} names a set twice")
    return {name: _other(config, name) for name in names if name != config.name}


def _other(config: Any, name: str) -> Any:
    values = option_values("data", name)
    taken = {key: config[key] for key in TAKEN if key != "exclude" or key in values}
    taken |= {key: config[key] for key in DRAWN if "num_val" in values and config[key] is not None}
    return OmegaConf.merge(OmegaConf.structured(DataConfig), values, taken, {"val": None})


def matched(splits: Splits, classes: Sequence[str], *, name: str) -> Splits:
    """Return the images of these classes, labelled in their order; images of other classes are left out.

    Args:
        name: of the data set, for the error message.

    Raises:
        UserError: the set lacks a class.
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


def _relabelled(images: Images | MaskedImages, new_labels: Sequence[int | None]) -> Images | MaskedImages:
    """Return images with a new label for each clean one; images whose class has no new label are left out.

    In masks, the pixels of such a class are ignored.
    """
    if isinstance(images, MaskedImages):
        return replace(images, open_mask=partial(_open_mask, images, classes_of(new_labels)))
    clean = np.asarray(images.labels if images.clean_labels is None else images.clean_labels, np.int64)
    new = np.array([-1 if label is None else label for label in new_labels])[clean]
    kept = np.flatnonzero(new >= 0)
    return replace(
        images,
        labels=new[kept],
        open_image=partial(_open, images, kept),
        read_pixels=None if images.read_pixels is None else partial(_read, images.read_pixels, kept),
        name_of=None,
        clean_labels=None,
        of_other_classes=len(new) - len(kept),
    )


def classes_of(new_labels: Sequence[int | None]) -> np.ndarray:
    """Return the new class of each value of a mask, (256,) in uint8."""
    table = np.full(256, IGNORED, np.uint8)
    table[: len(new_labels)] = [IGNORED if label is None else label for label in new_labels]
    return table


def _open_mask(images: MaskedImages, table: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(table[np.asarray(images.open_mask(index))])


def _open(images: Images, kept: np.ndarray, index: int) -> Image.Image:
    return images.open_image(int(kept[index]))


def _read(read_pixels: Callable[[np.ndarray], np.ndarray], kept: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return read_pixels(kept[indices])
