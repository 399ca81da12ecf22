"""`exnorm claims`: test the claims of the papers on the measurements.

A comparison has a `left` and a `right`, from the study's yaml. Each is a cell, a weighted sum of cells, or a number. A
cell that leaves an axis open is the mean over that axis. The test uses the differences d_i of left and right for equal
seeds (equal data order and initialization), in the t-tests of `tests_of_difference`. n is the number of seeds that both
sides have. If the comparison names seeds, only those count: they were chosen before their first run, so the claim was
not picked because of them.

The mean is tested against a threshold, which depends on the claim. For "left > right" it is 0. For "left >= right" (no
worse than) it is -0.5 points, fixed beforehand. For "left >= k * right" it is 0, for left - k right; right is a gain,
and the 95 % interval of its mean must be above 0. Where the test decides nothing, a second one asks whether the
difference is smaller than 0.5 points to either side. Both are Holm-corrected over all comparisons of the paper at this
scale, whether they were measured yet or not.

If the corrected p is below 0.05, a comparison is supported above the threshold and contradicted below it. If that of
the second test is, there is no difference larger than 0.5 points. All others are undecided. So are those with fewer
than 2 seeds, without any spread of the differences, or without a gain. A comparison that does not do what the paper did
is not comparable. An "always" claim counts runs instead. It is supported if all runs of the left cells ended with a
finite loss. It is contradicted if one diverged, and undecided while some are missing. n runs without a divergence leave
room for a share of 1 - 0.05^(1/n) that diverges (95 % confidence, for independent runs).

A claim is supported if all of its comparisons are supported, and contradicted if one is contradicted. It is supported
in part if some are supported, and no difference was found in the others. Fewer than 5 seeds, or runs, are weak. While
seeds that the study plans are missing, a verdict is one "so far": whoever stops when it suits has no p-value.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, NamedTuple

from exnorm.config.errors import UserError, suggest
from exnorm.config.study import Cell, Study, compared_cells, fresh_seeds
from exnorm.report.measured import measured
from exnorm.report.published import claims_of
from exnorm.report.tests_of_difference import (
    LEVEL,
    detectable,
    highest_share,
    holm,
    interval_of,
    p_equivalent,
    p_value,
)
from exnorm.report.wording import written_cells, written_comparison
from exnorm.runs.records import DIVERGED_AT, METRICS, Row

MARGIN = 0.5  # points: "no worse than" allows as many, and smaller differences are called none
ENOUGH_SEEDS = 5
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
SAME = f"no difference larger than {MARGIN}"
IN_PART = "supported in part"
NOT_COMPARABLE = "not comparable"


class Runs(NamedTuple):
    """Numbers of runs of some cells.

    Attributes:
        finished, diverged: runs that ended with a finite loss, and without one.
        wanted: runs that the study has.
    """

    finished: int
    diverged: int
    wanted: int


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim, and its result.

    Attributes:
        threshold: the mean difference is tested against it; None if the paper claims no direction.
        differences: left - right of each seed, or left - k right.
        gains: right of each seed, for a claim about a multiple of it.
        p, p_holm: None for fewer than 2 seeds, and for equal differences, which have no spread.
        p_same, p_same_holm: of "the difference is larger than 0.5 points". None, too, for metrics that are not in %.
        runs: numbers of runs, for an "always" claim.
        missing: number of seeds that the study plans and that some cell has not run.
        fresh: the seeds that alone decide it, such as "10-29"; empty for all seeds.
        not_comparable: why the comparison is not the paper's.
    """

    claim: str
    metric: str
    text: str
    threshold: float | None
    differences: tuple[float, ...]
    p: float | None = None
    p_holm: float | None = None
    p_same: float | None = None
    p_same_holm: float | None = None
    gains: tuple[float, ...] = ()
    runs: Runs | None = None
    missing: int = 0
    fresh: str = ""
    not_comparable: str = ""

    @property
    def n(self) -> int:
        """The number of seeds that both sides have; of runs that have ended, for an "always" claim."""
        return self.runs.finished + self.runs.diverged if self.runs else len(self.differences)

    @property
    def is_tested(self) -> bool:
        """Whether p-values decide it."""
        return not (self.runs or self.not_comparable)

    @property
    def mean(self) -> float | None:
        """The mean difference."""
        return mean(self.differences) if self.differences else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference. It is not corrected."""
        return interval_of(self.differences)

    @property
    def detectable(self) -> float | None:
        """The smallest difference that so many seeds find in 80 of 100 repetitions."""
        return detectable(self.differences)

    @property
    def verdict(self) -> str:
        """One of the verdicts above. If no direction is claimed: whether a difference was found."""
        if self.not_comparable:
            return NOT_COMPARABLE
        if self.runs:
            finished, diverged, wanted = self.runs
            return CONTRADICTED if diverged else SUPPORTED if finished == wanted else UNDECIDED
        gained = interval_of(self.gains)
        if self.p_holm is None or (self.gains and (gained is None or gained[0] <= 0)):
            return UNDECIDED
        decided = self.p_holm < LEVEL
        if not decided and self.p_same_holm is not None and self.p_same_holm < LEVEL:
            return SAME
        if self.threshold is None:
            return "no direction claimed, " + ("a difference found" if decided else "none found")
        if not decided:
            return UNDECIDED
        return SUPPORTED if mean(self.differences) > self.threshold else CONTRADICTED


def check(study: Study) -> None:
    """Refuse a study with an unknown metric, or with a claim that cannot be judged.

    Raises:
        UserError: the study has one.
    """
    wanted = [*study.metrics, *(claim["metric"] for claim in study.values.get("claims", ()) if "metric" in claim)]
    known = known_metrics(study)
    for metric in wanted:
        if metric not in known:
            raise UserError(f"study {study.id}: unknown metric '{metric}': {suggest(str(metric), known)}")
    judge(study, [])


def known_metrics(study: Study) -> list[str]:
    """Return the names of all metrics that are recorded of a study's runs."""
    return [*(metric.name for metric in study.task_metrics), f"train_{study.primary.name}", *METRICS]


def _in_percent(study: Study) -> list[str]:
    """Return the metrics in %, of which a difference is in points."""
    own = [metric.name for metric in study.task_metrics if metric.unit == "%"]
    return [*own, *([f"train_{study.primary.name}"] if study.primary.unit == "%" else []), "ratio_kl/large"]


def judge(study: Study, rows: Sequence[Row]) -> list[Comparison]:
    """Return every comparison of a study, with Holm's correction over them alone."""
    return corrected(compared(study, rows))


def corrected(own: Sequence[Comparison], others: Sequence[Comparison] = ()) -> list[Comparison]:
    """Return comparisons with Holm's correction over them and over others of their family."""
    tested = [item for item in (*own, *others) if item.is_tested]
    different = iter(holm([item.p for item in tested]))
    same = iter(holm([item.p_same for item in tested]))
    return [replace(item, p_holm=next(different), p_same_holm=next(same)) if item.is_tested else item for item in own]


def compared(study: Study, rows: Sequence[Row]) -> list[Comparison]:
    """Return every comparison of a study, without the correction."""
    known = claims_of(study)
    return [_compare(study, rows, wanted, known[str(wanted["id"])].expect) for wanted in study.values.get("claims", ())]


def overall(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on a claim from the verdicts on its comparisons."""
    verdicts = [comparison.verdict for comparison in comparisons]
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    if set(verdicts) == {SUPPORTED, SAME}:
        return IN_PART
    return verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED


def as_claimed(comparisons: Sequence[Comparison]) -> str:
    """Return how many mean differences lie on the claimed side, decided or not, such as `2 of 3`."""
    sides = [c.mean > c.threshold for c in comparisons if c.mean is not None and c.threshold is not None]
    return f"{sum(sides)} of {len(sides)}" if sides else "–"


def is_weak(comparisons: Sequence[Comparison]) -> bool:
    """Return whether a comparison has fewer than 5 seeds, or runs."""
    return any(comparison.n < ENOUGH_SEEDS for comparison in comparisons)


def is_begun(comparisons: Sequence[Comparison]) -> bool:
    """Return whether something was measured of a claim."""
    return any(comparison.n for comparison in comparisons)


def is_so_far(comparisons: Sequence[Comparison]) -> bool:
    """Return whether a comparison lacks seeds, or runs, that the study plans."""
    return any(comparison.missing for comparison in comparisons)


def _compare(study: Study, rows: Sequence[Row], wanted: Mapping[str, Any], expect: str) -> Comparison:
    if expect == "always":
        return _count(study, rows, wanted)
    if not any(compared_cells(wanted[side]) for side in ("left", "right") if side in wanted) or "right" not in wanted:
        raise UserError(f"study {study.id}: claim {wanted['id']} needs a cell at left, and a cell or a number at right")
    metric = wanted.get("metric", study.metrics[0])
    fresh = fresh_seeds(wanted, study.scale)
    values = {
        cell: {seed: number for seed, number in value.by_seed.items() if seed in fresh or not fresh}
        for cell, value in measured(study, rows, metric).items()
    }
    factor = _factor(expect)
    left, right = _terms(study, wanted["left"]), _terms(study, wanted["right"])
    differences = tuple(_differences([*left, *((-factor * weight, cells) for weight, cells in right)], values))
    threshold, points = _threshold(expect), metric in _in_percent(study)
    if threshold and not points:
        raise UserError(
            f"study {study.id}: claim {wanted['id']}: 'left >= right' allows {MARGIN} points, and {metric} is not in "
            f"%. Write expect: left > right, or use a metric in %: {', '.join(_in_percent(study))}"
        )
    return Comparison(
        str(wanted["id"]),
        metric,
        text=written_comparison(study, wanted["left"], _sign(expect), wanted["right"]),
        threshold=threshold,
        differences=differences,
        p=p_value(differences, threshold or 0.0),
        p_same=p_equivalent(differences, MARGIN) if points and not threshold and factor == 1 else None,
        gains=tuple(_differences(right, values)) if factor != 1 else (),
        missing=_missing(study, rows, [*compared_cells(wanted["left"]), *compared_cells(wanted["right"])], fresh),
        fresh=str(wanted.get("seeds", {}).get(study.scale, "")),
        not_comparable=str(wanted.get("not_comparable", "")),
    )


def _missing(study: Study, rows: Sequence[Row], selectors: Sequence[Mapping[Any, Any]], fresh: Sequence[int]) -> int:
    """Count the planned seeds that some of the cells have not run; a run that diverged has ended."""
    cells = [cell for selector in selectors for cell in study.cells_with(selector)]
    planned = set.intersection(*(set(cell.seeds) for cell in cells))
    ended = _seeds(study, rows, cells, (study.primary.name, DIVERGED_AT))
    return len((planned & set(fresh) if fresh else planned) - set.intersection(*ended))


def _count(study: Study, rows: Sequence[Row], wanted: Mapping[str, Any]) -> Comparison:
    """Count the runs of some cells, with the study's seeds, that ended with a finite loss."""
    if not isinstance(wanted["left"], Mapping):
        raise UserError(f"study {study.id}: claim {wanted['id']} needs cells at left, such as {{norm: en}}")
    cells = study.cells_with(wanted["left"])
    ended = sum(map(len, _seeds(study, rows, cells, (study.primary.name, DIVERGED_AT))))
    finished = sum(map(len, _seeds(study, rows, cells, ("loss",))))
    runs = Runs(finished, ended - finished, sum(len(cell.seeds) for cell in cells))
    counted = f"{ended} of {runs.wanted} runs have ended, {runs.diverged} of them without a finite loss"
    if finished and not runs.diverged:
        counted += f" (95 %: below {math.ceil(100 * highest_share(finished))} %)"
    return Comparison(
        str(wanted["id"]),
        "loss",
        f"{written_cells(study, wanted['left'])}: {counted}",
        None,
        (),
        runs=runs,
        missing=0 if runs.diverged else runs.wanted - ended,  # one that diverged decides it
    )


def _seeds(study: Study, rows: Sequence[Row], cells: Sequence[Cell], metrics: Sequence[str]) -> list[set[int]]:
    """Return the seeds of each cell for which one of the metrics was recorded."""
    found = [measured(study, rows, metric) for metric in metrics]
    return [
        {seed for values in found if cell.name in values for seed in values[cell.name].by_seed if seed in cell.seeds}
        for cell in cells
    ]


Term = tuple[float, list[str] | None]  # a weight, and the cells whose mean it multiplies; None: the number 1


def _terms(study: Study, side: Any) -> list[Term]:
    """Return the terms of one side of a comparison: a cell, `[[weight, cell], ...]`, or a number."""
    if isinstance(side, int | float):
        return [(float(side), None)]
    if isinstance(side, Mapping):
        return [(1.0, _cells(study, side))]
    return [(float(weight), _cells(study, cell)) for weight, cell in side]


def _cells(study: Study, selector: Mapping[str, str]) -> list[str]:
    return [cell.name for cell in study.cells_with(selector)]


def _differences(terms: Sequence[Term], values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """Return the weighted sum for each seed that all cells have."""
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
