"""Data sets: one file each, named as in `conf/data/`, and the loaders that all of them share.

A data set's file has two functions: `fingerprint(config)`, which imports no torch because the controller calls it,
checks that the files are there and returns a text that changes with them; and `load(config) -> Splits`.
"""

import importlib
from types import ModuleType
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.groups import option_values
from exnorm.data import noise
from exnorm.data.splits import Splits

MADE_TO_ORDER = ("num_classes", "num_train", "num_val", "seed")  # options of sets that are drawn


def data_set(name: str) -> ModuleType:
    """The module of a data set, by its `data.name`."""
    return importlib.import_module(f"exnorm.data.{name}")


def fingerprint(data_config: Any) -> str:
    """A text that changes with the files of a data set; without importing torch.

    Raises:
        UserError: the files are not there, with the layout that was expected; an option that cannot be.
    """
    noise.check(data_config.noise)
    known = option_values("data", data_config.name)
    for option in MADE_TO_ORDER:
        if data_config[option] is not None and option not in known:
            raise UserError(f"data.{option}: {data_config.name} is as it is; leave the option out")
    return data_set(data_config.name).fingerprint(data_config)


def load(data_config: Any) -> Splits:
    """The images of a data set, with label noise in training if that is asked for."""
    return noise.with_noise(data_set(data_config.name).load(data_config), data_config.noise)
