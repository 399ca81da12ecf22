"""Compose a checked configuration from `conf/` and overrides. Every mistake becomes a one-line UserError.

`exnorm train` itself goes through `hydra.main`; tests and the other commands compose here.
"""

import functools
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from exnorm.config.backbones import register_requested
from exnorm.config.errors import UserError
from exnorm.config.explain import check_keys, explain, is_user_error
from exnorm.config.folders import conf_dir
from exnorm.config.groups import (
    group_options,
    own_values,
    register_model_names,
    register_option,
    register_schemas,
    search_words,
)
from exnorm.config.loggers import check_sinks
from exnorm.config.options import UNTYPED, USUAL_TASK, check_options, split_norm
from exnorm.config.schema import TrainConfig
from exnorm.config.words import with_home

__all__ = [
    "calibration_data",
    "check_options",
    "check_train",
    "compose_eval",
    "compose_train",
    "default_values",
    "explain",
    "group_options",
    "register_model_names",
    "register_schemas",
    "schema_defaults",
    "split_norm",
]

# A model is tested with the crops that it was trained with, on every data set.
CROPS = ("image_size", "resize", "mean", "std")


def compose_train(overrides: list[str]) -> DictConfig:
    """Compose and check the configuration of a training run; raise UserError for a mistake."""
    register_requested(overrides)
    config = composed("train", overrides)
    check_train(config)
    return config


def compose_eval(run_data: dict[str, Any], overrides: list[str]) -> DictConfig:
    """Compose the configuration of an evaluation of a run with the data configuration `run_data`.

    `data.root=X` alone changes the run's data configuration; `data=imagefolder data.root=X` replaces it. The run's
    crops stay, unless an override changes them.
    """
    register_option("data", "run", run_data)
    config = composed("eval", overrides)
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    for key in CROPS:
        if f"data.{key}" not in given and key in run_data:
            config.data[key] = run_data[key]
    if config.data.roots is None:
        config.data.roots = run_data.get("roots")
    check_keys(resolved(config, "eval"), "eval")
    return config


def calibration_data(wanted: Any, own: Any) -> Any:
    """Return the data configuration from which batch averages are computed: the run's training set.

    Args:
        wanted: the `data` of the evaluation. It is returned if it is the same set, because its paths are current.
        own: the `data` of the run.
    """
    return wanted if wanted["name"] == own["name"] else own


def check_train(config: DictConfig) -> None:
    """Raise UserError for an unknown key, an unresolvable value, or a wrong option of norm, task or a sink."""
    values = resolved(config, "train")
    check_keys(values, "train")
    check_sinks(values["logger"]["sinks"])
    for group in UNTYPED:
        check_options(group, values.get(group, {}))


def schema_defaults() -> dict[str, Any]:
    """Return the defaults of every key that the schema types."""
    return values_of(TrainConfig)


@functools.cache
def values_of(schema: type) -> dict[str, Any]:
    """Return the defaults of a class of the schema. They are made once, so nobody may change them."""
    values = OmegaConf.to_container(OmegaConf.structured(schema), throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def default_values(norm_name: str, task_name: str = USUAL_TASK) -> dict[str, Any]:
    """Return the defaults of the schema and of the yaml of norm and task. A run's hash leaves out values equal to them.

    The norm's name has no default, so it is always in the hash. That of the task is there if it is another task than
    classification. A yaml that is not exnorm's own can change at any time, so all of its values are in the hash.
    """
    norm = own_values("norm", norm_name)
    norm.pop("name", None)
    task = {**own_values("task", task_name), "name": USUAL_TASK}
    return {**schema_defaults(), "norm": norm, "task": task}


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """Run Hydra's composition with the schemas in place; its exceptions become UserError."""
    register_schemas()
    try:
        with initialize_config_dir(str(conf_dir()), job_name=config_name, version_base="1.3"):
            return compose(config_name, [*search_words(), *map(with_home, overrides)])
    except Exception as exc:
        if not is_user_error(exc):
            raise
        raise UserError(explain(exc, config_name)) from exc


def resolved(config: DictConfig, config_name: str) -> dict[str, Any]:
    """Return plain values with every interpolation resolved."""
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except Exception as exc:
        if not is_user_error(exc):
            raise
        raise UserError(explain(exc, config_name)) from exc
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
