"""Check the option `logger`: one name, or a list such as [csv,tensorboard].

Each name is a YAML file of the group, or the full name of a class. Hydra merges the files of a list, so each file turns
on its own sinks, and `offline` is only another name for `[csv,wandb]`.
"""

from collections.abc import Iterable
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.explain import dotted
from exnorm.config.groups import CLASS, option_values
from exnorm.config.options import written
from exnorm.config.words import chosen

OFF = "off"  # the option that is there to stand alone


def check_loggers(overrides: Iterable[str]) -> None:
    """Check each `logger=NAME`, `logger=[NAME,...]` and sweep over them.

    Raises:
        UserError: there is no such logger, or two names of a list do not go together.
    """
    for value in chosen("logger", overrides):
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"logger={written(value)}: give names, such as logger=csv or 'logger=[csv,tensorboard]'")
        if OFF in names and len(names) > 1:
            raise UserError(f"logger={written(names)}: {OFF} does not go with other loggers. Leave out {OFF}")
        _check_overlap(names)


def _check_overlap(names: list[str]) -> None:
    """Raise UserError if a name is given twice, or if two names set the same key."""
    set_by: dict[str, str] = {}
    for name in names:
        values = {key: value for key, value in option_values("logger", name).items() if key != "defaults"}
        for key in dotted(values):
            if (other := set_by.setdefault(key, name)) != name:
                both = f"{other} and {name} both set logger.{key}"
                raise UserError(f"logger={written(names)}: {both}. Leave out one of them")
        if names.count(name) > 1:
            raise UserError(f"logger={written(names)} has {name} more than once. Give each logger once")


def check_sinks(sinks: Any) -> None:
    """Raise UserError if an entry of `logger.sinks` does not give the class of a sink."""
    for name, values in sinks.items():
        target = values.get("_target_") if isinstance(values, dict) else None
        if not (isinstance(target, str) and CLASS.fullmatch(target)):
            raise UserError(
                f"logger.sinks.{name}: write _target_: my_package.MySink, and its options as further keys; "
                f"it has _target_: {target}"
            )
