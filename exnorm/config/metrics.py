"""The metrics of a task, as its yaml in `conf/task/` declares them. Reports and listings know no metric by name."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from exnorm.config.groups import option_values
from exnorm.config.options import USUAL_TASK


class Metric(NamedTuple):
    """One number that a task measures on a validation set.

    Attributes:
        name: as in `val/<name>`.
        label: how tables and figures call it.
        unit: "%" or nothing.
        digits: decimal places.
        larger_is_better: whether the best checkpoint is that with the largest value.
    """

    name: str
    label: str
    unit: str
    digits: int
    larger_is_better: bool

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label} {self.unit}".rstrip()

    @property
    def key(self) -> str:
        """The name in a row of `metrics.jsonl` and in `record.json`."""
        return f"val/{self.name}"

    def written(self, value: float | None) -> str:
        """Return a value with its digits and its unit."""
        return self.number(value) if value is None else f"{self.number(value)} {self.unit}".rstrip()

    def number(self, value: float | None) -> str:
        """Return a value with its digits. None is a value that JSON cannot hold."""
        return "not finite" if value is None else f"{value:.{self.digits}f}"

    @property
    def worst(self) -> float:
        """Minus infinity, or infinity where smaller values are better."""
        return -math.inf if self.larger_is_better else math.inf

    def better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one. NaN is never better."""
        return value > other if self.larger_is_better else value < other


def metrics_of(config: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a run's configuration, the primary one first. An older configuration does not list them."""
    task = config.get("task") or {"name": USUAL_TASK}
    return declared(task["metrics"]) if "metrics" in task else metrics_of_task(task["name"])


def metrics_of_task(name: str) -> tuple[Metric, ...]:
    """Return the metrics of a task by its name."""
    return declared(option_values("task", name)["metrics"])


def declared(metrics: Any) -> tuple[Metric, ...]:
    """Return metrics as a yaml or a record lists them."""
    return tuple(Metric(**metric) for metric in metrics)
