"""`exnorm claims`: what the papers claim, judged by what was measured.

A comparison is `left` against `right`, each a cell, several cells with weights, or a number, as the study's yaml says;
cells that leave an axis open are averaged over it. It is judged by the differences of equal seeds, d_i (equal data
order and initialization), of which n are there:

    mean ± t_{0.975, n-1} s / sqrt(n)        the 95 % interval of the mean difference
    p = 2 P(T_{n-1} > |mean - threshold| / (s / sqrt(n))), Holm-corrected over the comparisons of the study

"left > right" has the threshold 0; "left >= right" (no worse than) -0.5 points, fixed beforehand; "left >= k * right" 0
for left - k right, where right, a gain, is above 0 in the mean. Corrected p below 0.05 is supported above the threshold
and contradicted below it; all else is undecided: fewer than 2 seeds, differences without any spread, no gain. "Always"
counts runs instead: it is supported if all runs of the left's cells ended with a finite loss, contradicted if one
diverged, undecided while some are missing.

A claim is supported if all of its comparisons are, contradicted if one of them is. Fewer than 5 seeds are weak. Holm:
S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any, NamedTuple

from exnorm.config.errors import UserError, suggest
from exnorm.config.study import Cell, Study, cell_name, compared_cells
from exnorm.report.measured import measured
from exnorm.report.published import claims_of
from exnorm.runs.records import DIVERGED_AT, METRICS, Row

LEVEL = 0.05
MARGIN = 0.5  # points that "no worse than" allows
IN_POINTS = ("top1", "top5", "train_top1", "ratio_kl/large")  # metrics in %
ENOUGH_SEEDS = 5
NO_SPREAD = 1e-9  # of differences: what rounding leaves of 0
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


class Runs(NamedTuple):
    """The runs of some cells.

    Attributes:
        finished, diverged: those with a finite loss at the end, and those without.
        wanted: how many the study has.
        seeds: of the cell with the fewest.
    """

    finished: int
    diverged: int
    wanted: int
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim and what came of it.

    Attributes:
        threshold: the mean difference is judged against it; None where the paper claims no direction.
        differences: left - right of each seed, or left - k right.
        gains: right of each seed, in a claim about a multiple of it.
        p, p_holm: None of fewer than 2 seeds and of equal differences, which say nothing of their spread.
        runs: of a claim about what always holds.
    """

    claim: str
    metric: str
    text: str
    threshold: float | None
    differences: tuple[float, ...]
    p: float | None = None
    p_holm: float | None = None
    gains: tuple[float, ...] = ()
    runs: Runs | None = None

    @property
    def n(self) -> int:
        """The number of seeds that both sides have."""
        return self.runs.seeds if self.runs else len(self.differences)

    @property
    def mean(self) -> float | None:
        """The mean difference."""
        return mean(self.differences) if self.differences else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference."""
        if self.p is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(1 - LEVEL / 2, self.n - 1)) * stdev(self.differences) / math.sqrt(self.n)
        return mean(self.differences) - half, mean(self.differences) + half

    @property
    def verdict(self) -> str:
        """supported, contradicted or undecided; where no direction is claimed, whether there is a difference."""
        if self.runs:
            finished, diverged, wanted, _ = self.runs
            return CONTRADICTED if diverged else SUPPORTED if finished == wanted else UNDECIDED
        if self.p_holm is None or (self.gains and mean(self.gains) <= 0):
            return UNDECIDED
        decided = self.p_holm < LEVEL
        if self.threshold is None:
            return "no direction claimed, " + ("a difference found" if decided else "none found")
        if not decided:
            return UNDECIDED
        return SUPPORTED if mean(self.differences) > self.threshold else CONTRADICTED


def check(study: Study) -> None:
    """Refuse a study that asks for a metric which no run has, or for a verdict that cannot be given.

    Raises:
        UserError: it does.
    """
    wanted = [*study.metrics, *(claim["metric"] for claim in study.values.get("claims", ()) if "metric" in claim)]
    for metric in wanted:
        if metric not in METRICS:
            raise UserError(f"study {study.id}: unknown metric '{metric}': {suggest(str(metric), METRICS)}")
    judge(study, [])


def judge(study: Study, rows: Sequence[Row]) -> list[Comparison]:
    """Every comparison of a study, with Holm's correction over them."""
    known = claims_of(study)
    found = [
        _compare(study, rows, wanted, known[str(wanted["id"])].expect) for wanted in study.values.get("claims", ())
    ]
    corrected = iter(holm([comparison.p for comparison in found if not comparison.runs]))
    return [item if item.runs else replace(item, p_holm=next(corrected)) for item in found]


def overall(comparisons: Sequence[Comparison]) -> str:
    """The verdict on a claim by those on its comparisons."""
    verdicts = [comparison.verdict for comparison in comparisons]
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED


def as_claimed(comparisons: Sequence[Comparison]) -> str:
    """`2 of 3`: how many mean differences, of those that claim a direction, lie on its side, decided or not."""
    sides = [c.mean > c.threshold for c in comparisons if c.mean is not None and c.threshold is not None]
    return f"{sum(sides)} of {len(sides)}" if sides else "–"


def is_weak(comparisons: Sequence[Comparison]) -> bool:
    """Whether one of them has fewer than 5 seeds."""
    return any(comparison.n < ENOUGH_SEEDS for comparison in comparisons)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Corrected p-values: of the i-th smallest of m the largest of (m - j + 1) p_j for j up to i, at most 1.

    What has no p-value yet counts as one of the m, so that a verdict is not taken back when it gets one.
    """
    order = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, (len(values) - rank) * value)
        corrected[index] = min(1.0, largest)
    return corrected


def p_value(differences: Sequence[float], threshold: float) -> float | None:
    """The two-sided p-value of a t-test of the mean against a threshold; None of fewer than 2 values, or equal ones."""
    if len(differences) < 2 or max(differences) - min(differences) < NO_SPREAD:
        return None
    from scipy.stats import t

    error = stdev(differences) / math.sqrt(len(differences))
    distance = abs(mean(differences) - threshold)
    return float(2 * t.sf(distance / error, len(differences) - 1))


def _compare(study: Study, rows: Sequence[Row], wanted: Mapping[str, Any], expect: str) -> Comparison:
    if expect == "always":
        return _count(study, rows, wanted)
    if not any(compared_cells(wanted[side]) for side in ("left", "right") if side in wanted) or "right" not in wanted:
        raise UserError(f"study {study.id}: claim {wanted['id']}: write a cell at left and one, or a number, at right")
    metric = wanted.get("metric", study.metrics[0])
    values = {cell: value.by_seed for cell, value in measured(study, rows, metric).items()}
    factor = _factor(expect)
    left, right = _terms(study, wanted["left"]), _terms(study, wanted["right"])
    differences = tuple(_differences([*left, *((-factor * weight, cells) for weight, cells in right)], values))
    threshold = _threshold(expect)
    if threshold and metric not in IN_POINTS:
        raise UserError(
            f"study {study.id}: claim {wanted['id']}: 'left >= right' allows {MARGIN} points, and {metric} is not in "
            f"%; expect left > right, or use {', '.join(IN_POINTS)}"
        )
    return Comparison(
        str(wanted["id"]),
        metric,
        text=f"{_written(study, wanted['left'])} {_sign(expect)} {_written(study, wanted['right'])}",
        threshold=threshold,
        differences=differences,
        p=p_value(differences, threshold or 0.0),
        gains=tuple(_differences(right, values)) if factor != 1 else (),
    )


def _count(study: Study, rows: Sequence[Row], wanted: Mapping[str, Any]) -> Comparison:
    """How many runs of some cells, of the study's seeds, ended with a finite loss."""
    if not isinstance(wanted["left"], Mapping):
        raise UserError(f"study {study.id}: claim {wanted['id']}: write cells at left, such as {{norm: en}}")
    cells = study.cells_with(wanted["left"])
    ended = [_seeds(study, rows, cell, ("top1", DIVERGED_AT)) for cell in cells]
    finished = sum(len(_seeds(study, rows, cell, ("loss",))) for cell in cells)
    diverged = sum(map(len, ended)) - finished
    runs = Runs(finished, diverged, sum(len(cell.seeds) for cell in cells), min(map(len, ended)))
    counted = f"{finished + diverged} of {runs.wanted} runs are there, {diverged} of them without a finite loss"
    return Comparison(str(wanted["id"]), "loss", f"{_written(study, wanted['left'])}: {counted}", None, (), runs=runs)


def _seeds(study: Study, rows: Sequence[Row], cell: Cell, metrics: Sequence[str]) -> set[int]:
    """The seeds of a cell that one of the metrics was recorded of."""
    found = [measured(study, rows, metric).get(cell.name) for metric in metrics]
    return {seed for value in found if value is not None for seed in value.by_seed if seed in cell.seeds}


Term = tuple[float, list[str] | None]  # a weight, and the cells whose mean it weighs; None: the number 1


def _terms(study: Study, side: Any) -> list[Term]:
    """The left or right of a comparison: a cell, `[[weight, cell], ...]`, or a number."""
    if isinstance(side, int | float):
        return [(float(side), None)]
    if isinstance(side, Mapping):
        return [(1.0, _cells(study, side))]
    return [(float(weight), _cells(study, cell)) for weight, cell in side]


def _cells(study: Study, selector: Mapping[str, str]) -> list[str]:
    return [cell.name for cell in study.cells_with(selector)]


def _differences(terms: Sequence[Term], values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """The weighted sum of each seed that all cells have."""
    cells = [cell for _, names in terms for cell in names or ()]
    seeds = set.intersection(*(set(values.get(cell, {})) for cell in cells))
    return [
        sum(weight * (1.0 if names is None else mean(values[cell][seed] for cell in names)) for weight, names in terms)
        for seed in sorted(seeds)
    ]


def _factor(expect: str) -> float:
    found = re.search(r"(\d+) \* right", expect)
    return float(found[1]) if found else 1.0


def _threshold(expect: str) -> float | None:
    if expect == "unknown":
        return None
    return -MARGIN if expect == "left >= right" else 0.0


def _sign(expect: str) -> str:
    if expect == "unknown":
        return "against"
    return expect.removeprefix("left ").removesuffix("right").strip()


def _written(study: Study, side: Any) -> str:
    """A side of a comparison in words, with what stands for a value at this scale in its place."""
    if isinstance(side, int | float):
        return f"{side:g}"
    if isinstance(side, Mapping):
        return cell_name((axis, study.label(str(value))) for axis, value in side.items())
    parts = [f"{'-' if weight < 0 else '+'} ({_written(study, cell)})" for weight, cell in side]
    return "(" + " ".join(parts).removeprefix("+ ") + ")"
