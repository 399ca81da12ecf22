"""The groups of `conf/`, their options, and the schema that types them.

The files `<group>/*.yaml` in `conf/`, and in folders of users and of installed packages, are the options of a group;
nothing is registered by hand.
"""

import copy
import functools
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from exnorm.config.errors import SHOWN, UserError, nearest, shorten, suggest
from exnorm.config.folders import conf_dir, conf_folders
from exnorm.config.schema import EvalConfig, TrainConfig
from exnorm.config.words import in_hydras_quotes

CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # the full name of a class or a module
BY_CLASS = ("norm", "logger")  # groups that take the full name of a class
OF_STUDIES = ("study", "scale")  # only `exnorm reproduce` reads these folders of conf/; no run composes them


def groups() -> list[str]:
    """Return the names of the groups that have an option and can be a part of a run."""
    return sorted({file.parent.name for file in conf_dir().glob("*/*.yaml")} - set(OF_STUDIES))


def group_options(group: str) -> list[str]:
    """Return the names of the yaml files of a group, sorted."""
    return sorted({file.stem for folder in _folders_of(group) for file in (folder / group).glob("[!.]*.yaml")})


def _folders_of(group: str) -> list[Path]:
    """Return the folders with options of a group. Studies are exnorm's own: their claims are judged together."""
    return [conf_dir()] if group in OF_STUDIES else conf_folders()


def option_file(group: str, name: str) -> Path:
    """Return the yaml file of an option; raise UserError with the nearest name if there is none."""
    found = [file for folder in _folders_of(group) if (file := folder / group / f"{name}.yaml").is_file()]
    if not found:
        raise UserError(unknown_option(group, name, group_options(group)))
    return found[0]


def is_own(group: str, name: str) -> bool:
    """Return whether an option is exnorm's own. The values of its yaml are then the defaults of its code."""
    return (conf_dir() / group / f"{name}.yaml").is_file()


def unknown_option(group: str, name: str, options: Iterable[str]) -> str:
    """Return the message for an unknown option, with the nearest one and all options, or the three nearest of many."""
    listed = list(options)
    if len(listed) > SHOWN:
        return f"unknown {group} '{name}': {suggest(name, listed, count=3)}"
    hint = f"{suggest(name, listed)} " if nearest(name, listed) else ""
    further = f". For another optimizer of timm type optim.name={name} optim.lr=RATE" if group == "optim" else ""
    return f"unknown {group} '{name}': {hint}allowed: {shorten(listed)}{further}"


def own_values(group: str, name: str) -> dict[str, Any]:
    """Return the values of an option that is exnorm's own; none of another one, which may have changed or be gone."""
    return option_values(group, name) if is_own(group, name) else {}


def is_class(group: str, name: str) -> bool:
    """Return whether the name of a normalizer or a logger is that of a class, such as my_package.MyNorm."""
    return group in BY_CLASS and CLASS.fullmatch(name) is not None


def search_words() -> list[str]:
    """Return the override with which Hydra finds the options of all folders; none if there is only exnorm's own.

    Raises:
        UserError: a file of another folder is wrong, or has the name of another file.
    """
    known: dict[str, Path] = {}
    own, *others = conf_folders()
    for file in (file for folder in others for file in sorted(folder.glob("*/[!.]*.yaml"))):
        name = f"{file.parent.name}/{file.name}"
        earlier = own / name if (own / name).is_file() else known.setdefault(name, file)
        if earlier != file:
            raise UserError(f"{earlier} and {file} have the same name. Give one of them another name")
        _check_outside(file)
    quoted = [in_hydras_quotes(f"file://{folder}") for folder in others]
    return [f"hydra.searchpath=[{','.join(quoted)}]"] if quoted else []


def _check_outside(file: Path) -> None:
    """Raise UserError if a yaml file of another folder lacks what an option of its group needs."""
    group, values = file.parent.name, file_values(file)
    key = {"norm": "_target_", "task": "_target_", "data": "module"}.get(group)
    if group in ("norm", "task", "data", "model") and values.get("name") != file.stem:
        raise UserError(f"{file}: write name: {file.stem}, as the file is called; it has name: {values.get('name')}")
    text = values.get(key) if key is not None else None
    if key is not None and not (isinstance(text, str) and CLASS.fullmatch(f"a.{text}")):
        example = "my_package.MyClass" if key == "_target_" else "my_package.my_set"
        raise UserError(f"{file}: write {key}: {example}; it has {key}: {text}")


def option_values(group: str, name: str) -> dict[str, Any]:
    """Return the values written in the yaml of an option. A class has no yaml, and no values but its name."""
    if is_class(group, name):
        sinks = {name.rpartition(".")[2]: {"_target_": name}}
        return {"sinks": sinks} if group == "logger" else {"name": name, "_target_": name}
    return file_values(option_file(group, name))


def file_values(file: Path) -> dict[str, Any]:
    """Return the values written in a yaml file; raise UserError if it holds no mapping."""
    try:
        values = _values_of(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError, RecursionError) as problem:
        raise UserError(f"{file} is not valid yaml: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} has no keys with values: write KEY: VALUE on each line")
    return {str(key): value for key, value in copy.deepcopy(values).items()}


@functools.lru_cache(maxsize=256)
def _values_of(text: str) -> Any:
    """Parse yaml, which takes 10 to 100 ms for a file; a study of several studies reads the same files often."""
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def describe(group: str, name: str) -> str:
    """Return the first comment of an option's yaml that is a sentence."""
    return first_comment(option_file(group, name))


def first_comment(file: Path) -> str:
    """Return the first comment of a yaml file that is a sentence."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((text for text in comments if not text.startswith("@package")), "")


@functools.cache
def register_schemas() -> None:
    """Register the two schemas with Hydra, under the names that `train.yaml` and `eval.yaml` use."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)


def register_option(group: str, name: str, values: dict[str, Any]) -> None:
    """Add an option to a group, as if it were a yaml file."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=group, name=name, node=values)


def register_model_names(names: Iterable[str]) -> None:
    """Make `model=NAME` work for names that have no yaml; a name with a yaml keeps it."""
    known = set(group_options("model"))
    for name in names:
        if name not in known:
            register_option("model", name, {"name": name})
