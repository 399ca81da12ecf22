"""Data sets: one file each, named as in `conf/data/`, and the loaders that all of them share.

A data set's file has two functions: `fingerprint(config, train=True)`, which imports no torch because the controller
calls it, checks that the files are there and returns a text that changes with them; and
`load(config, train=True) -> Splits`. With `train=False` the training images need not be there.
"""

import importlib
from types import ModuleType
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.groups import option_values
from exnorm.data import noise, validation
from exnorm.data.splits import Images, Splits

CROP_EXAMPLE = {"scale": "[0.08,1]", "ratio": "[0.75,1.33]"}
# Options that some sets have, and the others refuse.
PARTICULAR = ("num_classes", "num_train", "num_val", "seed", "train_list", "val_list", "source", "origin", "exclude")


def data_set(name: str) -> ModuleType:
    """The module of a data set, by its `data.name`."""
    return importlib.import_module(f"exnorm.data.{name}")


def fingerprint(config: Any, *, train: bool = True) -> str:
    """A text that changes with the files of a data set and of the further sets for validation; imports no torch.

    Args:
        train: whether the training images are needed.

    Raises:
        UserError: the files are not there, with the layout that was expected; an option that cannot be.
    """
    noise.check(config.noise)
    _check_crops(config)
    if not 0 <= config.max_bad_fraction < 1:
        raise UserError(f"data.max_bad_fraction={config.max_bad_fraction}: a share of the images, from 0 to below 1")
    known = option_values("data", config.name)
    for option in PARTICULAR:
        if config[option] is not None and option not in known:
            raise UserError(f"data.{option}={config[option]}: {config.name} has no such option; leave it out")
    own = data_set(config.name).fingerprint(config, train=train)
    return own + "".join(_fingerprint_for_validation(config, *item) for item in validation.others(config).items())


def _check_crops(config: Any) -> None:
    for key in ("image_size", "resize"):
        if config[key] < 1:
            raise UserError(f"data.{key}={config[key]} is not possible; give 1 or more")
    if config.resize < config.image_size:
        raise UserError(
            f"data.resize={config.resize} is smaller than data.image_size={config.image_size}; validation resizes "
            f"first and crops then, so give data.resize={config.image_size} or more"
        )
    for key in ("mean", "std"):
        if len(config[key]) != 3 or (key == "std" and min(config[key]) <= 0):
            raise UserError(f"data.{key}={list(config[key])}: a number for each of red, green and blue, of 1")
    for key, highest in (("scale", 1.0), ("ratio", float("inf"))):
        if len(config[key]) != 2 or not 0 < config[key][0] <= config[key][1] <= highest:
            raise UserError(
                f"data.{key}={list(config[key])}: a lowest and a highest value, such as {CROP_EXAMPLE[key]}"
            )


def _fingerprint_for_validation(config: Any, name: str, other: Any) -> str:
    try:
        return data_set(name).fingerprint(other, train=False)
    except UserError as problem:
        raise UserError(f"data.val={list(config.val)} names {name}: {problem}") from None


def load(config: Any, *, train: bool = True) -> Splits:
    """The images of a data set, with label noise in training if that is asked for."""
    return noise.with_noise(data_set(config.name).load(config, train=train), config.noise)


def validation_sets(config: Any, splits: Splits) -> dict[str, Images]:
    """The validation images of each set in `data.val`, by its name; without it, those of the set itself.

    Raises:
        UserError: a set that lacks a class of `splits`.
    """
    others = validation.others(config)
    return {
        name: validation.matched(load(others[name], train=False), splits.classes, name=name).val
        if name in others
        else splits.val
        for name in config.val or [config.name]
    }
