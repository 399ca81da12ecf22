"""Check that data, model and test fit the task, before anything is made. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from exnorm.config.compose import values_of
from exnorm.config.errors import UserError
from exnorm.config.groups import group_options, option_values, own_values
from exnorm.config.options import USUAL_TASK
from exnorm.config.schema import WHOLE, TestConfig
from exnorm.data import MASKS, targets_of


def check_task(config: Any) -> None:
    """Refuse a data set or an option of the model that the task cannot use.

    Raises:
        UserError: the message gives data sets and options that it can use.
    """
    check_targets(config.data, config.task)
    if config.task.targets != MASKS and config.model.head is not None:
        raise UserError(
            f"model.head={config.model.head}: task={config.task.name} has no such option. Leave it out, or type "
            f"task={_task_with(MASKS)}"
        )


def check_targets(data_config: Any, task_config: Mapping[str, Any]) -> None:
    """Refuse a data set, or another validation set, without the targets that the task needs.

    Raises:
        UserError: the message names data sets and tasks that fit.
    """
    wanted = task_config["targets"]
    given = {data_config.name: data_config.targets}
    given |= {name: targets_of(name) for name in data_config.val or () if name in group_options("data")}
    for name, targets in given.items():
        if targets != wanted:
            fitting = [other for other in group_options("data") if targets_of(other) == wanted]
            raise UserError(
                f"task={task_config['name']} needs {wanted}, and data={name} has {targets}. Type "
                f"task={_task_with(targets)}, or choose a data set with {wanted}: {', '.join(fitting)}"
            )


def _task_with(targets: str) -> str:
    """Return the first task that needs these targets."""
    return next(name for name in group_options("task") if option_values("task", name)["targets"] == targets)


def check_views(test: Any, task_config: Mapping[str, Any]) -> None:
    """Refuse scales, a flip or a window that cannot be, or that the task does not have.

    Raises:
        UserError: the message says what is allowed.
    """
    if not test.scales or min(test.scales) <= 0:
        raise UserError(f"test.scales={list(test.scales)}: give positive factors, such as 'test.scales=[0.75,1,1.25]'")
    if test.window != WHOLE and not (test.window.isdecimal() and int(test.window) > 0):
        raise UserError(f"test.window={test.window}: give the side of a window in px, or test.window={WHOLE}")
    if task_config["targets"] != MASKS:
        for key, default in values_of(TestConfig).items():
            if test[key] != default:
                raise UserError(f"test.{key}: task={task_config['name']} looks at each image once. Leave it out")


def read_task(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task of a run's configuration, with defaults for keys that are newer than the run."""
    task = run_config.get("task", {"name": USUAL_TASK})
    return {**own_values("task", task["name"]), **task}
