"""The measured values of a cell over seeds, with their mean and standard deviation, from a study's record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from exnorm.config.study import Study
from exnorm.runs.records import Row


@dataclass(frozen=True)
class Measured:
    """The values of one metric of one cell, by seed."""

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return mean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for one seed."""
        return stdev(self.by_seed.values()) if self.n > 1 else None


def measured(study: Study, rows: Sequence[Row], metric: str) -> dict[str, Measured]:
    """Return the values of a metric at the study's scale, by the name of the cell."""
    names = {cell.name for cell in study.cells}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["scale"] == study.scale and row["metric"] == metric and row["cell"] in names:
            found.setdefault(row["cell"], {})[int(row["seed"])] = float(row["value"])
    return {cell: Measured(dict(sorted(values.items()))) for cell, values in found.items()}
