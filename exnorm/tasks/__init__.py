"""Tasks: what a network puts out, what is minimized, and how it is scored. One file per task, named in `conf/task/`."""

from collections.abc import Sequence
from typing import Any

import hydra

from exnorm.config.errors import UserError
from exnorm.tasks.base import Task, Views, named

__all__ = ["Task", "Views", "make_task", "named"]


def make_task(config: Any, classes: Sequence[str]) -> Task:
    """Return the task that `task._target_` names, for the classes of a data set.

    Raises:
        UserError: there is no such class.
    """
    target = config["_target_"]
    try:
        chosen: Any = hydra.utils.get_class(target)
    except (ImportError, ValueError) as problem:
        if isinstance(problem.__cause__, ModuleNotFoundError | None):
            raise UserError(f"task._target_={target} cannot be imported as a class; give module.Class") from problem
        raise
    return chosen(config, classes)
