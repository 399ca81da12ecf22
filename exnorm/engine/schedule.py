"""How many optimizer steps a run has, and after which of them it validates. Imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, in parts that each end with a validation.

    Attributes:
        steps: optimizer steps in all.
        part: steps between validations; the last part may be shorter.
        unit: what the parts are called.
    """

    steps: int
    part: int
    unit: str = "epoch"

    @property
    def parts(self) -> int:
        """The number of validations."""
        return -(-self.steps // self.part)

    def start(self, part: int) -> int:
        """Return the first step of a part, counted from 0."""
        return min(self.steps, part * self.part)


def make_schedule(trainer: Any, *, steps_per_epoch: int) -> Schedule:
    """Return the schedule of `trainer.epochs` or `trainer.steps`, with `trainer.validate_every`.

    The parts are epochs, if `trainer.validate_every` does not say otherwise.
    """
    steps = trainer.epochs * steps_per_epoch if trainer.steps is None else trainer.steps
    if trainer.validate_every in (None, steps_per_epoch):
        return Schedule(steps, steps_per_epoch)
    return Schedule(steps, trainer.validate_every, "interval")
