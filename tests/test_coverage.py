"""scripts/timm_coverage.py: what it finds, what it makes of a failure, and that it goes on where it was stopped."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def cover(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[tuple[str, str], dict[str, str]]]:
    """Run the script; its end, and its rows by architecture and kind."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "timm_coverage.py", "--out", out, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    with out.open(newline="") as file:
        return done, {(row["architecture"], row["kind"]): row for row in csv.DictReader(file)}


def test_every_kind_of_an_architecture_is_converted_and_bn_is_the_same(tmp_path: Path) -> None:
    """A network with three kinds, and one with none; the page shows them."""
    out = tmp_path / "timm_coverage.csv"
    done, rows = cover(out, "--only", "test_[mn][af][xn]*")
    assert done.returncode == 0 and "1 of 1 architectures" in done.stdout, done.stderr
    kinds = ("batch", "layer2d", "layer")
    assert [rows["test_maxvit", kind]["result"] for kind in kinds] == ["converted"] * 3
    assert float(rows["test_maxvit", "batch"]["bn_difference"]) < 1e-12
    assert rows["test_nfnet", ""]["result"] == "nothing to convert"
    assert "| all | 1 | 1 | 100.0 % | 0 | 0 |" in (tmp_path / "README.md").read_text()


def test_it_goes_on_where_it_was_stopped_and_tries_failures_again(tmp_path: Path) -> None:
    """What took too long is a failure with its reason; the next call measures that one, on the meta device, alone."""
    out = tmp_path / "timm_coverage.csv"
    done, rows = cover(out, "--only", "test_resnet", "--limit-s", "0")
    assert done.returncode == 1 and rows["test_resnet", ""]["error"] == "took longer than 0 s"
    done, rows = cover(out, "--only", "test_[rv]*t", "--memory-gib", "0")
    assert done.returncode == 0 and len(rows) == 2
    assert all(row["result"] == "converted" and row["device"] == "meta" for row in rows.values())
    done, again = cover(out, "--only", "test_[rv]*t")
    assert again == rows and "test_" not in done.stdout


def test_a_pattern_that_matches_nothing_says_so(tmp_path: Path) -> None:
    """Exit code 2 and one line; no file is touched."""
    (tmp_path / "x.csv").write_text("")
    done, rows = cover(tmp_path / "x.csv", "--only", "resnet5000")
    assert done.returncode == 2 and "no architecture of timm matches 'resnet5000'" in done.stderr and not rows
