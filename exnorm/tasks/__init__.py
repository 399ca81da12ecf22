"""Tasks: what a network puts out, what is minimized, and how it is scored. One file per task, named in `conf/task/`."""

from collections.abc import Sequence
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.options import imported_class
from exnorm.tasks.base import Task, Views, named

__all__ = ["Task", "Views", "make_task", "named"]


def make_task(config: Any, classes: Sequence[str]) -> Task:
    """Return the task that `task._target_` names, for the classes of a data set.

    Raises:
        UserError: there is no such class, or it is not a task.
    """
    cls = imported_class("task", config["_target_"])
    if not issubclass(cls, Task):  # the name may come from a file of somebody else
        raise UserError(f"task._target_={config['_target_']} is not a subclass of exnorm.tasks.Task")
    return cls(config, classes)
