"""Data sets: one file each, named as in `conf/data/`, and the loaders that all of them share.

A data set's file has two functions. `fingerprint(config, train=True)` checks that the files exist and returns a text
that changes with them. It imports no torch, because the controller calls it. `load(config, train=True) -> Splits`
returns the images. With `train=False` the training images need not exist.
"""

import importlib
from types import ModuleType
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.groups import option_values
from exnorm.config.options import written
from exnorm.data import noise, noise_file, validation
from exnorm.data.splits import Images, MaskedImages, Splits

CROP_EXAMPLE = {"scale": "[0.08,1]", "ratio": "[0.75,1.33]"}
# Options that only some sets have; the others refuse them.
PARTICULAR = (
    "num_classes", "num_train", "num_val", "seed", "train_list", "val_list", "source", "origin", "split", "exclude"
)  # fmt: skip
LABELS, MASKS = "labels", "masks"  # what a data set gives for each image
FOR_LABELS = {"auto_augment": None, "random_erasing": 0}  # their values with masks
FOR_MASKS = {"short_sides": None, "long_side": None, "zoom": None, "rotation": 0, "blur": 0}  # their values with labels


def data_set(config: Any) -> ModuleType:
    """Return the module of a data set: `data.module` of a set of another package, else that of `data.name`.

    Raises:
        UserError: that module does not exist.
    """
    try:
        return importlib.import_module(config.module or f"exnorm.data.sets.{config.name}")
    except ModuleNotFoundError as problem:
        if config.module is None or not f"{config.module}.".startswith(f"{problem.name}."):
            raise
        raise UserError(
            f"data={config.name}: its module {config.module} cannot be imported ({problem}). Install its package, or "
            "set PYTHONPATH"
        ) from None


def targets_of(name: str) -> str:
    """Return what the data set with this name gives for each image: labels or masks."""
    return option_values("data", name).get("targets", LABELS)


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a text that changes with the files of a data set and of the other validation sets; imports no torch.

    Args:
        train: whether the training images are needed.

    Raises:
        UserError: the files do not exist (the message gives the expected layout), or an option has a wrong value.
    """
    noise.check(config.noise)
    _check_crops(config)
    _check_targets(config)
    (_check_options_for_masks if config.targets == MASKS else _check_options_for_labels)(config)
    if not 0 <= config.max_bad_fraction < 1:
        raise UserError(
            f"data.max_bad_fraction={config.max_bad_fraction} is not possible. Give a share of the images, from 0 to "
            "below 1"
        )
    known = PARTICULAR if config.module else option_values("data", config.name)
    for option in PARTICULAR:
        if config[option] is not None and option not in known:
            raise UserError(f"data.{option}={config[option]}: {config.name} has no such option. Leave it out")
    if config.cache and "exclude" not in known:
        raise UserError(f"data.cache=true: {config.name} has no files to decode. Leave it out")
    own = data_set(config).fingerprint(config, train=train)
    if train and config.noise.kind == noise.FILE:
        own += noise_file.fingerprint(config)
    return own + "".join(_fingerprint_for_validation(config, *item) for item in validation.others(config).items())


def _check_crops(config: Any) -> None:
    for key in ("image_size", "resize"):
        if config[key] < 1:
            raise UserError(f"data.{key}={config[key]} is not possible; give 1 or more")
    for key in ("mean", "std"):
        if len(config[key]) != 3 or (key == "std" and min(config[key]) <= 0):
            raise UserError(
                f"data.{key}={list(config[key])}: give a number for each of red, green and blue; white is 1"
            )
    for key, highest in (("scale", 1.0), ("ratio", float("inf"))):
        if len(config[key]) != 2 or not 0 < config[key][0] <= config[key][1] <= highest:
            raise UserError(
                f"data.{key}={list(config[key])}: give a lowest and a highest value, such as {CROP_EXAMPLE[key]}"
            )


def _check_targets(config: Any) -> None:
    own = config.targets if config.module else targets_of(config.name)
    if config.targets != own:
        raise UserError(f"data.targets={config.targets}, but {config.name} has {own}. Leave data.targets out")


def _check_options_for_labels(config: Any) -> None:
    if not 0 <= config.random_erasing <= 1:
        raise UserError(f"data.random_erasing={config.random_erasing:g} is not possible; give a probability, 0 to 1")
    if config.resize < config.image_size:
        raise UserError(
            f"data.resize={config.resize} is smaller than data.image_size={config.image_size}; validation resizes "
            f"first and crops then, so give data.resize={config.image_size} or more"
        )
    given = [f"data.{key}={written(config[key])}" for key, unset in FOR_MASKS.items() if config[key] != unset]
    if given:
        raise UserError(
            f"{', '.join(given)}: only data sets with masks use this, and {config.name} has labels. Leave it out"
        )


def _check_options_for_masks(config: Any) -> None:
    if noise.is_on(config.noise):
        raise UserError(f"data.noise changes labels, and {config.name} has masks. Leave data.noise out")
    if config.cache:
        raise UserError(f"data.cache=true: {config.name} has masks, and only images with labels are kept. Leave it out")
    if config.padding is not None:
        raise UserError(f"data.padding={config.padding}: {config.name} has masks, whose crops need none. Leave it out")
    for key, unset in FOR_LABELS.items():
        if config[key] != unset:
            raise UserError(f"data.{key}={config[key]} changes images alone, and {config.name} has masks. Leave it out")
    zoom, sides = config.zoom, config.short_sides
    checks = {
        "short_sides": (sides is None or (len(sides) and min(sides) >= 1), "sizes in px of at least 1", "[300,450]"),
        "long_side": (config.long_side is None or config.long_side >= 1, "a size in px of at least 1", "1000"),
        "zoom": (
            zoom is None or (len(zoom) == 2 and 0 < zoom[0] <= zoom[1]),
            "a lowest and a highest factor above 0",
            "[0.5,2.0]",
        ),
        "rotation": (0 <= config.rotation <= 180, "an angle from 0 to 180 degrees", "10"),
        "blur": (0 <= config.blur <= 1, "a probability from 0 to 1", "0.5"),
    }
    for key, (possible, allowed, example) in checks.items():
        if not possible:
            raise UserError(
                f"data.{key}={written(config[key])} is not possible; give {allowed}, such as data.{key}={example}"
            )
    if config.long_side is not None and sides is None:
        raise UserError(f"data.long_side={config.long_side} limits data.short_sides. Give that, too, or leave it out")


def _fingerprint_for_validation(config: Any, name: str, other: Any) -> str:
    if other.targets != config.targets:
        raise UserError(
            f"data.val={list(config.val)} names {name}, which has {other.targets}. {config.name} has {config.targets}"
        )
    try:
        return data_set(other).fingerprint(other, train=False)
    except UserError as problem:
        raise UserError(f"data.val={list(config.val)} names {name}: {problem}") from None


def load(config: Any, *, train: bool = True) -> Splits:
    """Return the images of a data set, with label noise in training if `data.noise` sets it."""
    return noise.with_noise(data_set(config).load(config, train=train), config)


def validation_sets(config: Any, splits: Splits) -> dict[str, Images | MaskedImages]:
    """Return the validation images of each set in `data.val`, by its name; without `data.val`, those of the set itself.

    Raises:
        UserError: a set lacks a class of `splits`.
    """
    others = validation.others(config)
    return {
        name: validation.matched(load(others[name], train=False), splits.classes, name=name).val
        if name in others
        else splits.val
        for name in config.val or [config.name]
    }
