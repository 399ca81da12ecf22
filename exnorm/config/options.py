"""Check `norm` and `task`, which have no schema: their yaml in `conf/` gives the defaults and types of options."""

import importlib
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from exnorm.config.errors import UserError, suggest
from exnorm.config.groups import is_class, option_values

USUAL_TASK = "classification"
UNTYPED = {"norm": "norm=en", "task": f"task={USUAL_TASK}"}  # groups whose options are typed by their yaml


def split_norm(norm: DictConfig | dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Split `norm` into its short name, the path of its class and the options for the class's constructor."""
    values = OmegaConf.to_container(norm, resolve=True) if isinstance(norm, DictConfig) else dict(norm)
    assert isinstance(values, dict)
    options = {str(key): value for key, value in values.items()}
    return options.pop("name"), options.pop("_target_"), options


def imported_class(group: str, target: str) -> Any:
    """Return the class that `_target_` of a group names. An error inside its module keeps its traceback.

    Raises:
        UserError: there is no such class.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ModuleNotFoundError as problem:
        if not f"{module}.".startswith(f"{problem.name}."):  # another module, which this one imports
            raise
        found = None
    if not isinstance(found, type):
        raise UserError(
            f"{group}._target_={target} cannot be imported as a class; give module.Class. "
            "For a module in the current folder set PYTHONPATH=."
        )
    return found


def check_options(group: str, chosen: DictConfig | dict[str, Any]) -> None:
    """Compare the options of `norm` or `task` with the defaults of its yaml; raise UserError for the first mistake.

    An integer is accepted as a float. Any value is accepted where the default is null.
    """
    values = OmegaConf.to_container(chosen, resolve=True) if isinstance(chosen, DictConfig) else chosen
    if not isinstance(values, dict) or "name" not in values:
        raise UserError(
            f"no {group} is chosen. Type for example {UNTYPED[group]}; exnorm list {group}s shows all of them"
        )
    name = str(values["name"])
    if is_class(group, name):  # its constructor knows its options
        return
    defaults = option_values(group, name)
    for key, value in values.items():
        if key not in defaults:
            raise UserError(f"unknown key '{group}.{key}' for {group} {name}: {suggest(str(key), defaults)}")
        if not fits(value, defaults[key]):
            raise UserError(f"{group}.{key}={written(value)}: expected {expected(defaults[key])}")


def fits(value: Any, default: Any) -> bool:
    """Return whether a value has the type of a default; items of a list are compared with the default's first item."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list) and all(fits(item, default[0]) for item in value if default)
    return isinstance(value, type(default))


def expected(default: Any) -> str:
    """Return the type of a default in words, with the default as an example."""
    if isinstance(default, bool):
        return "true or false"
    nouns = {int: "an integer", float: "a number", list: "a list", str: "a word"}
    return f"{nouns.get(type(default), 'a value')} such as {written(default)}"


def written(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | ListConfig):
        return "[" + ",".join(written(item) for item in value) + "]"
    return str(value)
