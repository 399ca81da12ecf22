"""Benchmarks: what they measure and record. Their times are nobody's test."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import CliRunner
from torch import nn

from exnorm.diagnostics import bench, bench_data, bench_norms, bench_train

CPU = torch.device("cpu")


def test_a_ratio_compares_what_ran_in_the_same_round() -> None:
    """The median and the quartiles of the rounds' ratios, not the ratio of medians."""
    assert bench.ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == {"ratio": 2.0, "ratio_q25": 2.0, "ratio_q75": 3.0}


def test_candidates_run_in_turn_and_the_first_round_does_not_count() -> None:
    """a b a b a b for two rounds."""
    calls: list[str] = []
    seconds = bench.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("ababab") and [len(values) for values in seconds.values()] == [2, 2]


def test_saved_bytes_are_counted_once_per_storage_without_what_is_excluded() -> None:
    """A ReLU in place behind a linear layer saves the output once; weight and input are known."""
    x, layer = torch.randn(8, 16, requires_grad=True), nn.Linear(16, 4)
    exclude = [x, *layer.parameters()]
    assert bench.saved_bytes(lambda: layer(x).relu_() * 2, exclude=exclude) == 8 * 4 * 4
    assert bench.saved_bytes(lambda: layer(x), exclude=[]) == 8 * 16 * 4 + 16 * 4 * 4


def test_every_layer_of_the_bench_is_measured_against_torchs_bn() -> None:
    """Baseline 1, a row for each candidate; ours saves less than BN and ReLU, naive EN several times as much."""
    rows = {row["layer"]: row for row in bench_norms.measure((2, 32, 32, 32), ["bn", "en"], ["eager"], 2, CPU)}
    assert list(rows) == ["torch bn", "torch gn", "torch in", "naive en", "naive sn", "bn eager", "en eager"]
    assert rows["torch bn"]["ratio"] == 1
    assert rows["en eager"]["saved_mib"] < rows["torch bn"]["saved_mib"] < rows["naive en"]["saved_mib"] / 3


def test_training_steps_are_measured_against_the_untouched_model() -> None:
    """Two rows; the converted model saves what timm's saves, and small tensors."""
    timm_row, own = bench_train.measure("test_resnet", "en", 4, 96, "eager", 2, False, CPU)
    assert timm_row["layers"] == "timm" and timm_row["ratio"] == 1 and own["layers"] == "en eager"
    assert timm_row["saved_mib"] < own["saved_mib"] < 1.1 * timm_row["saved_mib"]
    assert own["images_per_s"] > 0 and own["first_step_s"] > 0 and own["peak_mib"] == ""


def test_rows_carry_their_origin_and_the_page_shows_the_newest(tmp_path: Path) -> None:
    """Two measurements of one thing: both stay in the CSV, with device and versions; the page shows the second."""
    row = {"shape": "1x2x3x4", "layer": "torch bn", "rounds": 2, "ms": 1.0, "saved_mib": 0.5}
    for ratio in (0.111, 0.222):
        bench.append(tmp_path / "norms.csv", [{**row, "ratio": ratio}], device=CPU)
    rows = list(csv.DictReader((tmp_path / "norms.csv").read_text().splitlines()))
    assert [r["ratio"] for r in rows] == ["0.111", "0.222"]
    assert all(r["torch"] == torch.__version__.split("+")[0] and "threads" in r["device"] for r in rows)
    page = (tmp_path / "README.md").read_text()
    assert "| torch bn | 0.222 | 0.5 |" in page and "0.111" not in page


def test_the_loader_is_measured_against_a_bare_image_folder(tmp_path: Path) -> None:
    """On imitated photographs: both loaders, decoding, augmentation; the tables show the row."""
    with bench_data._root([], 68) as overrides:
        config = bench_data.compose_train([*overrides, "data.workers=0", "data.image_size=32"]).data
        row = bench_data.measure(config, 64, 2)
    speeds = ("loader", "bare_image_folder", "decode", "augment", "ratio")
    assert row["images"] == 64 and all(row[name] > 0 for name in speeds)
    bench.append(tmp_path / "data.csv", [row], device=CPU)
    assert f"| imagefolder | 32 | 0 | {row['loader']}" in (tmp_path / "README.md").read_text()


def test_a_set_without_folders_has_no_bare_loader_to_compare_with() -> None:
    """Digits come from one file."""
    row = bench_data.measure(bench_data.compose_train(["data=digits"]).data, 64, 2)
    assert row["loader"] > 0 and row["bare_image_folder"] == row["ratio"] == ""


def test_the_index_is_measured_in_a_process_of_its_own() -> None:
    """Seconds for the first start and for one with the cache, and memory."""
    row = bench_data.measure_index(20_000)
    assert row["entries"] == 20_000 and row["again_s"] > 0 and 0 < row["mib_above_imports"] < 100


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("norms", "--shape", "16x64x7"), "shape '16x64x7' is not possible; allowed: samples x channels"),
        (("norms", "--norm", "enn"), "unknown norm 'enn'; allowed: bn, "),
        (("norms", "--backend", "fast"), "unknown back end 'fast'; allowed: auto, eager, compiled"),
        (("train", "--model", "resnet5"), "unknown model"),
        (("data", "data=imagenet"), "data=imagenet needs a folder"),
    ],
)
def test_a_wrong_argument_is_one_line(cli_here: CliRunner, arguments: tuple[str, ...], problem: str) -> None:
    """Exit code 2, and nothing is written."""
    done = cli_here("bench", *arguments)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
