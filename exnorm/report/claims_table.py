"""The verdicts of studies as tables: for the terminal, for a page, and as plain numbers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.study import Study, load_study
from exnorm.config.study_file import has_scale
from exnorm.report.grids import Entry, Grid
from exnorm.report.published import Claim, claims, claims_of
from exnorm.report.verdicts import (
    ENOUGH_SEEDS,
    NOT_COMPARABLE,
    Comparison,
    compared,
    corrected,
    is_begun,
    is_so_far,
    is_weak,
    overall,
)
from exnorm.runs.records import read_records
from exnorm.runs.sinks import csv_text
from exnorm.runs.table import print_table

HEADS = ("claim", "verdict", "comparison", "metric", "difference", "95 % interval", "n", "detectable", "p (Holm)")
VERDICT = HEADS.index("verdict")
WEAK = (
    f"fewer than {ENOUGH_SEEDS} seeds, or runs where these are counted; one seed decides nothing, and two seeds decide "
    "only clear differences"
)
SO_FAR = "some of the seeds, or runs, that the study plans are missing, so the verdict may change"


@dataclass(frozen=True)
class Judged:
    """A study and its comparisons, by the id of the claim."""

    study: Study
    comparisons: dict[str, list[Comparison]]


def judged_studies(names: Sequence[str], scale: str, results: Path) -> list[Judged]:
    """Return the studies with measurements at a scale, judged. Without names, all studies.

    Raises:
        UserError: the folder of results does not exist.
    """
    if not results.is_dir():
        raise UserError(f"there is no folder {results}. Type exnorm reproduce STUDY first, or --results FOLDER")
    known = {name: _compare(load_study(name, scale), results) for name in _studies_at(scale)}
    chosen = [known.get(name) or _compare(load_study(name, scale), results) for name in names or known]
    return [_judge(item, known.values()) for item in chosen if item.is_measured]


def _studies_at(scale: str) -> list[str]:
    return [name for name in group_options("study") if has_scale(name, scale)]


def judged_study(study: Study, results: Path) -> Judged:
    """Return a study with its comparisons, measured or not."""
    others = [name for name in _studies_at(study.scale) if name != study.id]
    return _judge(_compare(study, results), [_compare(load_study(name, study.scale), results) for name in others])


class _Compared(NamedTuple):
    """A study, whether it was measured at its scale, and its comparisons before they are corrected."""

    study: Study
    is_measured: bool
    comparisons: Sequence[Comparison]

    @property
    def paper(self) -> str:
        return str(self.study.values.get("paper", self.study.id))


def _compare(study: Study, results: Path) -> _Compared:
    rows = read_records(results, study.id)
    return _Compared(study, any(row["scale"] == study.scale for row in rows), compared(study, rows))


def _judge(own: _Compared, everyone: Iterable[_Compared]) -> Judged:
    """Correct the comparisons of a study together with those of all other studies of its paper, measured or not."""
    others = [other for other in everyone if other.study.id != own.study.id and other.paper == own.paper]
    by_claim: dict[str, list[Comparison]] = {}
    for comparison in corrected(own.comparisons, [item for other in others for item in other.comparisons]):
        by_claim.setdefault(comparison.claim, []).append(comparison)
    return Judged(own.study, by_claim)


def grid_of(judged: Judged) -> Grid:
    """Return a row for each comparison, and the verdict on each claim in bold."""
    rows = []
    for claim, comparisons in judged.comparisons.items():
        for comparison in comparisons:
            rows.append([Entry(text) for text in _texts(comparison)])
        if len(comparisons) > 1:
            rows.append([Entry(claim), Entry(labelled(comparisons), True), *[Entry("")] * (len(HEADS) - 2)])
        else:
            rows[-1][VERDICT] = Entry(labelled(comparisons), True)
    return Grid(HEADS, rows)


def labelled(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on a claim, and whether planned seeds are missing, or a comparison has fewer than 5."""
    verdict = overall(comparisons)
    if verdict == NOT_COMPARABLE:
        return verdict
    return verdict + (" (so far)" if is_so_far(comparisons) else " (weak)" if is_weak(comparisons) else "")


def readings(judged: Judged) -> list[str]:
    """Return a line for each claim with several comparisons: how many have which verdict, and the range of effects."""
    several = {claim: found for claim, found in judged.comparisons.items() if len(found) > 1}
    return [_reading(claim, found) for claim, found in several.items() if is_begun(found)]


def counted(comparisons: Sequence[Comparison]) -> str:
    """Return how many comparisons have which verdict."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"of {len(comparisons)} comparisons, {verdicts}"


def _reading(claim: str, comparisons: Sequence[Comparison]) -> str:
    lines = [f"`{claim}`: {counted(comparisons)}."]
    for metric in dict.fromkeys(comparison.metric for comparison in comparisons):
        known = {c.mean: c.text for c in comparisons if c.metric == metric and c.mean is not None}
        if len(known) > 1:
            low, high = min(known), max(known)
            lines.append(f"In {metric}, the effect is from {low:+.2f} ({known[low]}) to {high:+.2f} ({known[high]}).")
    return " ".join(lines)


def not_covered() -> list[str]:
    """Return the claims that no study tests."""
    studies = [load_study(name, "mini") for name in group_options("study")]
    covered = {wanted["id"] for study in studies for wanted in study.values.get("claims", ())}
    return [claim for claim in claims() if claim not in covered]


def as_csv(judged: Sequence[Judged]) -> str:
    """Return CSV with a line for each comparison of each study."""
    lines: list[list[Any]] = []
    lines.append(
        ["study", "scale", "claim", "metric", "comparison", "n", "mean", "low", "high", "detectable", "p", "p_holm"]
        + ["p_same_holm", "verdict", "claim_verdict"]
    )
    for item in judged:
        for claim, comparisons in item.comparisons.items():
            for comparison in comparisons:
                numbers = [comparison.mean, *(comparison.interval or (None, None)), comparison.detectable]
                numbers += [comparison.p, comparison.p_holm, comparison.p_same_holm]
                lines.append(
                    [item.study.id, item.study.scale, claim, comparison.metric, comparison.text, comparison.n]
                    + ["" if number is None else f"{number:.4g}" for number in numbers]
                    + [comparison.verdict, labelled(comparisons)]
                )
    return csv_text(lines)


def _texts(comparison: Comparison) -> list[str]:
    middle, interval, p = comparison.mean, comparison.interval, comparison.p_holm
    return [
        comparison.claim,
        comparison.verdict,
        comparison.text,
        comparison.metric,
        "–" if middle is None else f"{middle:+.2f}",
        "–" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
        f"{comparison.n} ({comparison.fresh})" if comparison.fresh else str(comparison.n),
        "–" if comparison.detectable is None else f"{comparison.detectable:.2f}",
        "–" if p is None else f"{p:.3g}",
    ]


def print_verdicts(judged: Sequence[Judged]) -> None:
    """Print the verdicts, study by study, and the claims that no study tests."""
    if not judged:
        print("Nothing was measured yet. Type exnorm reproduce STUDY")
        return
    known: dict[str, Claim] = {}
    for item in judged:
        known |= claims_of(item.study)
        table = Table(*HEADS, box=None, pad_edge=False)
        for row in grid_of(item).rows:
            table.add_row(*(f"[bold]{text}[/bold]" if bold else escape(text) for text, bold in row))
        print(f"{item.study.id}, scale {item.study.scale}: {item.study.title}")
        print_table(table)
    every = [comparisons for item in judged for comparisons in item.comparisons.values()]
    if any(map(is_weak, every)):
        print(f"weak: {WEAK}")
    if any(map(is_so_far, every)):
        print(f"so far: {SO_FAR}")
    print("The claims:")
    for name, claim in known.items():
        print(f"  {name} ({claim.paper}): {claim.claim}")
    uncovered = ", ".join(not_covered())
    print(f"No study tests: {uncovered}" if uncovered else "Every claim has a study")
