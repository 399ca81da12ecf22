"""Tasks: what a network puts out, what is minimized, and how it is scored. One file per task, named in `conf/task/`."""

from collections.abc import Sequence
from typing import Any

from exnorm.config.options import imported_class
from exnorm.tasks.base import Task, Views, named

__all__ = ["Task", "Views", "make_task", "named"]


def make_task(config: Any, classes: Sequence[str]) -> Task:
    """Return the task that `task._target_` names, for the classes of a data set.

    Raises:
        UserError: there is no such class.
    """
    return imported_class("task", config["_target_"])(config, classes)
