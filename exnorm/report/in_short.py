"""The first screen of `results/README.md`: which claims hold, which do not, and by how much, scale by scale."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from exnorm.config.study_file import SCALES
from exnorm.report.claims_table import Judged, counted
from exnorm.report.published import claims_of
from exnorm.report.verdicts import (
    CONTRADICTED,
    IN_PART,
    MARGIN,
    SAME,
    SUPPORTED,
    UNDECIDED,
    Comparison,
    is_begun,
    is_so_far,
    is_weak,
    overall,
)

IMAGES = {
    "mini": "on images that exnorm draws",
    "small": "on CIFAR-10, with a small ResNet",
    "gpu": "on CIFAR-10, with a ResNet-18 on a GPU",
    "full": "on the papers' data",
}
HEADINGS = {  # the verdicts that a reader looks for first
    SUPPORTED: "These claims hold",
    IN_PART: "These hold in part",
    CONTRADICTED: "These do not hold",
    SAME: f"Here, what the claim compares differs by less than {MARGIN} points",
}

OTHERS = {  # by whether the seeds that were run leave it open
    True: "Undecided, with the seeds that were run",
    False: "No direction is claimed, or the comparison is not the paper's",
}
FEW = 2  # comparisons of a claim that are all shown


class Found(NamedTuple):
    """A claim at one scale, and the verdict on it."""

    verdict: str
    item: Judged
    claim: str
    comparisons: Sequence[Comparison]


def in_short(judged: Sequence[Judged]) -> str:
    """Return Markdown with the decided claims; the scale with the most real images comes first, with the effects."""
    at = {scale: [item for item in judged if item.study.scale == scale] for scale in reversed(SCALES)}
    scales = [scale for scale, items in at.items() if items]
    parts = []
    for number, scale in enumerate(scales):
        parts += _of_scale(scale, at[scale], _names if number else _lines)
    parts += [f"The effects at scale {' and '.join(scales[1:])} are in the tables below."] if scales[1:] else []
    return "\n\n".join(["## In short", *parts])


def _of_scale(scale: str, judged: Sequence[Judged], written: Callable[[str, Sequence[Found]], str]) -> list[str]:
    """Return the paragraphs of a scale; `written` returns claims with the same verdict under a heading."""
    found = [
        Found(overall(comparisons), item, claim, comparisons)
        for item in judged
        for claim, comparisons in item.comparisons.items()
        if is_begun(comparisons)
    ]
    begun = [row for row in found if is_so_far(row.comparisons)]
    complete = [row for row in found if not is_so_far(row.comparisons)]
    decided = sum(row.verdict in HEADINGS for row in complete)
    count = f"{decided} of {len(found)} claims are decided" if decided else f"none of {len(found)} claims is decided"
    parts = [f"**Scale {scale}, {IMAGES[scale]}:** {count}."]
    for wanted, heading in HEADINGS.items():
        rows = [row for row in complete if row.verdict == wanted]
        parts += [written(heading, rows)] if rows else []
    for is_open, text in OTHERS.items():
        left = [row for row in complete if row.verdict not in HEADINGS and (row.verdict == UNDECIDED) is is_open]
        parts += [_names(text, left)] if left else []
    parts += [_names("Not judged yet, because some of the planned seeds are missing", begun)] if begun else []
    return parts


def _names(heading: str, rows: Sequence[Found]) -> str:
    return f"{heading}: " + ", ".join(f"`{row.claim}` ({row.item.study.id})" for row in rows) + "."


def _lines(heading: str, rows: Sequence[Found]) -> str:
    return "\n".join([f"{heading}:", "", *(_line(row.item, row.claim, row.comparisons) for row in rows)])


def _line(item: Judged, claim: str, comparisons: Sequence[Comparison]) -> str:
    """Return one claim with its effects."""
    weak = " (weak)" if is_weak(comparisons) else ""
    known = [comparison for comparison in comparisons if comparison.runs or comparison.mean is not None]
    if len(known) <= FEW:
        effects = "; ".join(effect_of(comparison) for comparison in known)
    else:
        effects = _reading(known)
    return f"- {claims_of(item.study)[claim].claim}{weak}. `{item.study.id}`: {effects}."


def _reading(comparisons: Sequence[Comparison]) -> str:
    """Return how many comparisons have which verdict, and the lowest and the highest effect in each metric."""
    texts = [counted(comparisons)]
    for metric in dict.fromkeys(comparison.metric for comparison in comparisons):
        own = sorted((c for c in comparisons if c.metric == metric), key=lambda c: c.mean or 0.0)
        texts.append(" to ".join(map(effect_of, own[:: max(1, len(own) - 1)])))
    return "; ".join(texts)


def effect_of(comparison: Comparison) -> str:
    """Return what was compared, the mean difference with its 95 % interval, and the number of seeds."""
    if comparison.runs or comparison.mean is None:
        return comparison.text
    interval = comparison.interval
    within = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
    return f"{comparison.metric} {comparison.text}: {comparison.mean:+.2f}{within}, n = {comparison.n}"
