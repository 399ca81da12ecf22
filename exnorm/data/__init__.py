"""Data sets: one file each, named as in `conf/data/`, and the loaders that all of them share.

A data set's file has two functions: `fingerprint(config)`, which imports no torch because the controller calls it,
checks that the files are there and returns a text that changes with them; and `load(config) -> Splits`.
"""

import importlib
from types import ModuleType
from typing import Any


def data_set(name: str) -> ModuleType:
    """The module of a data set, by its `data.name`."""
    return importlib.import_module(f"exnorm.data.{name}")


def fingerprint(data_config: Any) -> str:
    """A text that changes with the files of a data set; without importing torch.

    Raises:
        UserError: the files are not there, with the layout that was expected.
    """
    return data_set(data_config.name).fingerprint(data_config)
