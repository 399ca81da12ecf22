"""Verdicts on the claims of the papers: what decides them, and what leaves them open."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from study_cases import own_study, put, row

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.study import load_study
from exnorm.config.study_file import SCALES, has_scale
from exnorm.report.claims_table import grid_of, judged_studies, labelled, readings
from exnorm.report.results import write_results
from exnorm.report.study_table import FORMATS, table_of
from exnorm.report.tests_of_difference import detectable, holm, p_equivalent, p_value
from exnorm.report.verdicts import (
    CONTRADICTED,
    IN_PART,
    MARGIN,
    NOT_COMPARABLE,
    SAME,
    SUPPORTED,
    UNDECIDED,
    as_claimed,
    is_weak,
    judge,
    overall,
)
from exnorm.report.wording import written_comparison
from exnorm.runs.records import DIVERGED_AT, Row

FIRST = 10  # of the seeds that decide claims at scale mini where a study gives them


def at_8x32(scores: Mapping[str, Iterable[float]]) -> list[Row]:
    """Rows of normalizers at 8x32 with the seeds that decide sn-regular-batch."""
    return [
        row(f"norm={norm} batch=8x32", FIRST + seed, value)
        for norm, of in scores.items()
        for seed, value in enumerate(of)
    ]


def verdict(tmp_path: Path, study: str, claim: str, rows: list[Row]) -> Any:
    """The comparisons of a claim, judged on rows."""
    return [found for found in judge(load_study(study, "mini"), rows) if found.claim == claim]


@pytest.mark.parametrize(
    ("sn", "expected"),
    [
        ([70.0, 71.0, 69.5, 70.2, 70.4], SUPPORTED),
        ([40.0, 41.0, 39.5, 40.2, 40.4], CONTRADICTED),
        ([70.0, 30.0, 55.0, 45.0, 60.0], UNDECIDED),
        ([70.0], UNDECIDED),
    ],
)
def test_a_claim_is_judged_by_the_differences_of_equal_seeds(sn: list[float], expected: str, tmp_path: Path) -> None:
    bn = [50.0, 50.5, 49.0, 50.1, 50.3]
    rows = [row("norm=sn batch=8x2", seed, value) for seed, value in enumerate(sn)]
    rows += [row("norm=bn batch=8x2", seed, value) for seed, value in enumerate(bn)]
    found, _ = verdict(tmp_path, "sn-table2", "sn-small-batch", rows)
    assert found.verdict == expected
    assert found.differences == tuple(a - b for a, b in zip(sn, bn, strict=False))
    if len(sn) > 1:
        reference = scipy.stats.ttest_rel(sn, bn)
        assert math.isclose(found.p, reference.pvalue)
        low, high = reference.confidence_interval(0.95)
        assert found.interval == pytest.approx((low, high))


def test_no_worse_than_allows_half_a_point(tmp_path: Path) -> None:
    """0.2 points below is within the margin, for certain; 0.8 below is not."""
    name = "norm=sn batch={} inference={}"
    for below, expected in ((0.2, SUPPORTED), (0.8, CONTRADICTED)):
        rows = [
            row(name.format(batch, rule), seed, 80.0 + seed - (below + 0.01 * (seed % 2)) * (rule != "moving_average"))
            for batch in ("8x32", "8x2")
            for rule in ("moving_average", "batch_average-50k", "batch_average-all")
            for seed in range(5)
        ]
        found = verdict(tmp_path, "sn-inference", "sn-batch-average", rows)
        assert len(found) == 3 and overall(found) == expected


def test_four_times_the_gain_is_compared_with_four_times_the_gain(tmp_path: Path) -> None:
    """EN - BN against 4 (SN - BN), seed by seed."""
    scores = {"bn": [70.0, 71.0, 70.5], "sn": [71.0, 72.0, 71.7], "en": [73.9, 75.2, 75.0]}
    rows = [row(f"norm={norm}", FIRST + seed, value) for norm, of in scores.items() for seed, value in enumerate(of)]
    (found,) = verdict(tmp_path, "en-webvision", "en-webvision", rows)
    assert found.differences == pytest.approx((-0.1, 0.2, -0.3))


@pytest.mark.parametrize(
    ("sn", "en", "expected"),
    [(1.0, 5.0, SUPPORTED), (1.0, 3.0, CONTRADICTED), (-3.0, -4.0, UNDECIDED), (-3.0, -20.0, UNDECIDED)],
)
def test_a_multiple_of_a_gain_needs_a_gain(sn: float, en: float, expected: str, tmp_path: Path) -> None:
    """Where SN loses against BN, four times its gain says nothing."""
    noise = {"bn": [0.0] * 5, "sn": (0.02, 0.0, -0.02, 0.01, 0.0), "en": (0.1, -0.1, 0.05, 0.0, -0.05)}
    gains = {"bn": 0.0, "sn": sn, "en": en}
    rows = [
        row(f"norm={norm}", FIRST + seed, 80.0 + gain + noise[norm][seed])
        for norm, gain in gains.items()
        for seed in range(5)
    ]
    (found,) = verdict(tmp_path, "en-webvision", "en-webvision", rows)
    assert found.verdict == expected


def test_no_difference_is_found_only_where_one_was_looked_for(tmp_path: Path) -> None:
    """A claim without a direction is undecided until there are two seeds."""
    scores = {"en": [80.0, 80.2], "relu": [79.0, 80.9]}
    rows = [row(f"variant={name}", seed, value) for name, of in scores.items() for seed, value in enumerate(of)]
    (one,) = verdict(tmp_path, "en-ablation", "en-tanh-relu", [item for item in rows if item["seed"] == "0"])
    (two,) = verdict(tmp_path, "en-ablation", "en-tanh-relu", rows)
    assert one.verdict == UNDECIDED and two.verdict == "no direction claimed, none found"


def test_fewer_than_five_seeds_are_weak_and_the_claimed_side_is_counted(tmp_path: Path) -> None:
    scores = {"sn": [80.0, 80.1, 80.2, 80.1, 80.0], "bn": [70.0, 70.2, 70.1, 70.3, 70.0], "gn": [80.0] * 5}
    for seeds, said in ((3, "supported (weak)"), (5, "supported")):
        rows = at_8x32({norm: of[:seeds] for norm, of in scores.items()})
        found = verdict(tmp_path, "sn-table2", "sn-regular-batch", rows)
        assert as_claimed(found) == "2 of 2" and is_weak(found) == (seeds < 5)
        assert labelled([replace(item, p_holm=0.001, missing=0) for item in found]) == said


def test_a_verdict_before_the_planned_seeds_are_measured_says_so(tmp_path: Path) -> None:
    """A run that diverged has ended; seeds beyond those of the study replace none."""
    scores = {"sn": [80.0 + seed / 100 for seed in range(20)], "bn": [70.0] * 20, "gn": [60.0] * 20}
    rows = at_8x32(scores)
    last = ("norm=bn batch=8x32", str(FIRST + 19))
    others = [item for item in rows if (item["cell"], item["seed"]) != last]
    diverged = row(last[0], int(last[1]), 17, metric=DIVERGED_AT)
    beyond = row(last[0], 99, 70.0)
    for given, missing, said in (
        (rows, 0, "supported"),
        (others, 1, "supported (so far)"),
        ([*others, beyond], 1, "supported (so far)"),
        ([*others, diverged], 0, "supported"),
        ([], 20, "undecided (so far)"),
    ):
        found = verdict(tmp_path, "sn-table2", "sn-regular-batch", given)
        assert labelled(found) == said and found[0].missing == missing
    (alone,) = verdict(tmp_path, "sn-table2", "sn-small-batch", [])[:1]
    assert alone.missing == 5


def test_a_claim_with_several_comparisons_needs_all_of_them(tmp_path: Path) -> None:
    scores = {"sn": [80.0, 80.1, 80.2], "bn": [70.0, 70.2, 70.1], "gn": [80.0, 80.4, 79.9]}
    rows = at_8x32(scores)
    found = verdict(tmp_path, "sn-table2", "sn-regular-batch", rows)
    assert [item.verdict for item in found] == [SUPPORTED, UNDECIDED] and overall(found) == UNDECIDED


def test_what_always_holds_is_counted_over_all_runs(tmp_path: Path) -> None:
    """Supported by all of a study's runs, contradicted by one that diverged, undecided while one is missing."""
    study = load_study("sn-table2", "mini")
    runs = [(cell.name, seed) for cell in study.cells for seed in cell.seeds if dict(cell.key)["norm"] == "en"]
    rows = [row(cell, seed, 0.5, metric=metric) for cell, seed in runs for metric in ("top1", "loss")]
    diverged = row(*runs[0], 17, metric=DIVERGED_AT)
    beyond = [row(runs[-1][0], 9, 0.5, metric=metric) for metric in ("top1", "loss")]  # no seed of the study
    for given, expected, count in (
        (rows, SUPPORTED, 33),
        ([diverged, *rows[2:]], CONTRADICTED, 33),
        ([rows[0], *rows[2:]], CONTRADICTED, 33),  # it ended, and its loss is not finite
        ([*rows[2:], *beyond], UNDECIDED, 32),
        (rows[10:], UNDECIDED, 28),
        ([], UNDECIDED, 0),
    ):
        (found,) = verdict(tmp_path, "sn-table2", "en-stable", given)
        assert found.verdict == expected and found.runs.wanted == len(runs) == 33 and found.n == count
        assert labelled([found]) == expected + (" (so far)" if count < 33 else "")
        limit = {33: "9", 32: "9", 28: "11"}.get(count)  # rounded up: 0.91^33 and 0.89^28 are below 5 %, 0.90^28 is not
        assert (f"(95 %: below {limit} %)" in found.text) == (expected != CONTRADICTED and count > 0)
    put(tmp_path, "sn-table2", [diverged, row("norm=en batch=8x32", 1, 90.0), row("norm=en batch=8x2", 0, 80.0)])
    text = FORMATS["md"](table_of(study, tmp_path))
    assert (
        "norm=en batch=8x32 diverged (its loss was not finite): seed 0 at step 17. Means and differences exclude"
        in text
    )
    put(tmp_path, "sn-table2", [diverged])
    assert "| en | diverged |" in FORMATS["md"](table_of(study, tmp_path)) and write_results(tmp_path)


def test_holm_corrects_by_the_number_of_comparisons_that_are_left() -> None:
    """Sorted p times m, m - 1, ..., never falling, at most 1; what is not measured yet counts in m."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06], abs=1e-12)
    assert holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.09, None, 0.04, 0.09], abs=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert p_value([1.0], 0.0) is None


@pytest.mark.parametrize("differences", [[0.05, 0.05], [20.0, 20.0, 20.0], [1.1 - 1.0, 2.1 - 2.0]])
def test_equal_differences_decide_nothing(differences: list[float], tmp_path: Path) -> None:
    """Without any spread nothing is known of the error, however large the difference is."""
    assert p_value(differences, 0.0) is None
    rows = [row("norm=bn batch=8x2", seed, 50.0) for seed in range(len(differences))]
    rows += [row("norm=sn batch=8x2", seed, 50.0 + value) for seed, value in enumerate(differences)]
    found, _ = verdict(tmp_path, "sn-table2", "sn-small-batch", rows)
    assert (found.verdict, found.p, found.interval) == (UNDECIDED, None, None)


def two(difference: float, spread: float, seeds: int = 5) -> list[Row]:
    """SN and BN at 8x32, whose differences have this mean and about this spread; GN is as SN."""
    noise = spread * np.linspace(-1, 1, seeds)
    scores = {"bn": np.full(seeds, 80.0), "sn": 80.0 + difference + noise, "gn": 70.0 + 2 * noise}
    return at_8x32(scores)


@pytest.mark.parametrize(
    ("difference", "spread", "expected"),
    [
        (0.0, 0.05, SAME),
        (0.3, 0.5, UNDECIDED),  # it could be 0, and it could be 0.6
        (0.3, 0.05, SUPPORTED),  # small, and not 0 for certain
        (-0.3, 0.05, CONTRADICTED),
        (0.49, 0.6, UNDECIDED),
    ],
)
def test_a_small_difference_is_called_none_where_the_seeds_can_tell(
    difference: float, spread: float, expected: str, tmp_path: Path
) -> None:
    found = verdict(tmp_path, "sn-table2", "sn-regular-batch", two(difference, spread))[0]
    assert found.verdict == expected


def test_equivalence_is_two_one_sided_tests() -> None:
    draw = np.random.default_rng(0)
    for n in (2, 5, 20):
        values = list(draw.normal(0.2, 0.3, n))
        sides = [
            scipy.stats.ttest_1samp(values, bound, alternative=side).pvalue
            for bound, side in ((-MARGIN, "greater"), (MARGIN, "less"))
        ]
        assert p_equivalent(values, MARGIN) == pytest.approx(max(sides))
    assert p_equivalent([0.1], MARGIN) is None and p_equivalent([0.1, 0.1], MARGIN) is None


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_a_detectable_difference_is_found_four_times_in_five(n: int) -> None:
    """In 40,000 repetitions whose true deviation is the measured one."""
    draw = np.random.default_rng(n)
    values = list(draw.normal(0.0, 2.0, n))
    found, deviation = detectable(values), np.std(values, ddof=1)
    assert found is not None
    repeated = scipy.stats.ttest_1samp(draw.normal(found, deviation, (40_000, n)), 0.0, axis=1)
    assert np.mean((repeated.pvalue < 0.05) & (repeated.statistic > 0)) == pytest.approx(0.8, abs=0.01)


def test_a_claim_is_supported_in_part_where_the_rest_shows_no_difference(tmp_path: Path) -> None:
    found = verdict(tmp_path, "sn-table2", "sn-regular-batch", two(0.0, 0.02))
    assert [item.verdict for item in found] == [SAME, SUPPORTED] and overall(found) == IN_PART
    assert overall([found[0], found[0]]) == SAME


def test_a_gain_that_could_be_none_has_no_multiple(tmp_path: Path) -> None:
    """Its mean is above 0, and its interval is not."""
    gains = {"bn": [0.0] * 5, "sn": [2.0, -1.0, 1.5, -0.5, 1.0], "en": [80.0, 81.0, 79.0, 80.5, 80.0]}
    rows = [row(f"norm={norm}", FIRST + seed, value) for norm, of in gains.items() for seed, value in enumerate(of)]
    (found,) = verdict(tmp_path, "en-webvision", "en-webvision", rows)
    assert found.verdict == UNDECIDED and found.p_holm < 0.001


def test_all_comparisons_of_a_paper_at_a_scale_are_one_family(tmp_path: Path) -> None:
    """Also those of studies that were not measured yet; those of the other paper are not."""
    rows = two(1.0, 0.5)
    put(tmp_path, "sn-table2", rows)
    (alone,) = (item for item in judge(load_study("sn-table2", "mini"), rows) if "norm=bn" in item.text and item.p)
    (judged,) = judged_studies(["sn-table2"], "mini", tmp_path)
    (found,) = (item for item in judged.comparisons["sn-regular-batch"] if "norm=bn" in item.text)
    studies = [load_study(name, "mini") for name in group_options("study")]
    counted = [
        wanted
        for study in studies
        for wanted in study.values["claims"]
        if study.values["paper"] == "sn2019" and wanted["id"] != "en-stable" and "not_comparable" not in wanted
    ]
    own = [wanted for wanted in load_study("sn-table2", "mini").values["claims"] if wanted["id"] != "en-stable"]
    assert len(counted) > len(own)
    assert found.p == alone.p and alone.p_holm == pytest.approx((len(own) - 1) * alone.p)
    assert found.p_holm == pytest.approx((len(counted) - 1) * found.p)  # the comparison with GN has a smaller one
    assert {study.values["paper"] for study in studies} == {"sn2019", "en2020"}


def test_what_is_not_comparable_is_neither_supported_nor_contradicted(tmp_path: Path) -> None:
    claim = "id: mine, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: bn}"
    rows = [
        row(f"norm={norm}", seed, mean + 0.1 * seed * (norm == "sn"))
        for norm, mean in (("bn", 80.0), ("sn", 70.0))
        for seed in range(5)
    ]
    for more, expected in (("", CONTRADICTED), (", not_comparable: other epochs", NOT_COMPARABLE)):
        study = own_study(tmp_path, f"axes: {{norm: [bn, sn]}}\nclaims: [{{{claim}{more}}}]")
        found = judge(load_study(study, "mini"), rows)
        assert labelled(found) == expected and found[0].mean == pytest.approx(-9.8)


FRESH = """
axes: {norm: [bn, sn, gn]}
seeds: 2
claims:
  - {id: mine, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: bn}, seeds: {mini: 10-13}}
  - {id: other, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: gn}}
"""


def test_a_comparison_with_seeds_of_its_own_is_decided_by_them_alone(tmp_path: Path) -> None:
    """The first seeds, which suggested it, say the opposite. The other scale and the other comparison do not change."""
    study = load_study(own_study(tmp_path, FRESH), "mini")
    rows = [row(f"norm={norm}", seed, 60 + seed % 3) for norm in ("bn", "gn") for seed in (0, 1, *range(10, 14))]
    rows += [row("norm=sn", seed, 90 + seed) for seed in (0, 1)]
    rows += [row("norm=sn", seed, 58 + seed % 3 + seed % 2 / 10) for seed in range(10, 14)]
    mine, other = judge(study, rows)
    assert (mine.n, mine.fresh, mine.verdict) == (4, "10-13", CONTRADICTED)
    assert (other.n, other.fresh) == (6, "")
    put(tmp_path, "mine", rows)
    (judged,) = judged_studies([study.named], "mini", tmp_path)
    assert "4 (10-13)" in [entry.text for entry in grid_of(judged).rows[0]]
    at_full = [found | {"scale": "full"} for found in rows]
    assert judge(load_study(own_study(tmp_path, FRESH), "full"), at_full)[0].n == 6


def test_the_cells_of_a_comparison_have_its_seeds(tmp_path: Path) -> None:
    """Only those cells, only at that scale, and not if the number of seeds is given."""
    file = own_study(tmp_path, FRESH)
    seeds = {cell.name: cell.seeds for cell in load_study(file, "mini").cells}
    own = (0, 1, 10, 11, 12, 13)
    assert seeds == {"norm=bn": own, "norm=sn": own, "norm=gn": (0, 1)}
    assert {cell.seeds for cell in load_study(file, "full").cells} == {(0, 1)}
    assert {cell.seeds for cell in load_study(file, "mini", seeds=3).cells} == {(0, 1, 2)}


@pytest.mark.parametrize("given", ["10-29", "{mini: 5}", "{mini: 29-10}", "{large: 10-29}", "{}"])
def test_seeds_of_another_form_get_one_line(tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"seeds: .* is not a range of seeds for each scale, such as \{mini: 10-29\}"):
        load_study(own_study(tmp_path, FRESH.replace("{mini: 10-13}", given)), "mini")


def test_a_claim_with_several_comparisons_is_read_out(tmp_path: Path) -> None:
    """The number of each verdict, and the smallest and the largest effect of each metric, with what was compared."""
    values = {"bn": 60.0, "sn": 62.0, "gn": 63.0}
    rows = [row(f"norm={n} batch=8x32", seed, v + seed % 2 / 10) for n, v in values.items() for seed in range(10, 30)]
    rows = [
        found | {"value": str(float(found["value"]) + (found["cell"][5] == "s") / 50 * (i % 3))}
        for i, found in enumerate(rows)
    ]
    put(tmp_path, "sn-table2", rows)
    (judged,) = judged_studies(["sn-table2"], "mini", tmp_path)
    (line,) = [line for line in readings(judged) if line.startswith("`sn-regular-batch`")]
    assert line.startswith(
        "`sn-regular-batch`: of 2 comparisons, 1 supported, 1 contradicted. In top1, the effect is from -0.9"
    )
    assert "(norm=sn > norm=gn at batch=8x32) to +2.0" in line
    assert line.endswith("(norm=sn > norm=bn at batch=8x32).")


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        ({"norm": "sn", "batch": "8x2"}, {"norm": "bn", "batch": "8x2"}, "norm=sn > norm=bn at batch=8x2"),
        ({"norm": "sn", "batch": "8x32"}, {"norm": "bn", "batch": "8x2"}, "norm=sn batch=8x32 > norm=bn batch=8x2"),
        ({"norm": "sn"}, {"norm": "sn", "batch": "8x2"}, "norm=sn > norm=sn batch=8x2"),
        (0.3, {"norm": "sn", "batch": "8x2"}, "0.3 > norm=sn batch=8x2"),
        (
            [[1, {"norm": "bn", "batch": "8x32"}], [-1, {"norm": "bn", "batch": "8x2"}]],
            [[1, {"norm": "sn", "batch": "8x32"}], [-1, {"norm": "sn", "batch": "8x2"}]],
            "(batch=8x32 - batch=8x2 at norm=bn) > (batch=8x32 - batch=8x2 at norm=sn)",
        ),
        (
            [[0.5, {"norm": "gn", "batch": "8x2"}], [0.5, {"norm": "bn", "batch": "8x2"}]],
            {"norm": "sn", "batch": "8x2"},
            "(0.5 * norm=gn + 0.5 * norm=bn) > norm=sn at batch=8x2",
        ),
    ],
)
def test_a_comparison_says_once_what_its_cells_share(left: Any, right: Any, text: str) -> None:
    assert written_comparison(load_study("sn-table2", "mini"), left, ">", right) == text


def test_the_comparisons_of_a_claim_have_different_names() -> None:
    for name in group_options("study"):
        for scale in SCALES:
            if has_scale(name, scale):
                named = [(item.claim, item.metric, item.text) for item in judge(load_study(name, scale), [])]
                assert len(set(named)) == len(named)
