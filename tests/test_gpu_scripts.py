"""The scripts for a machine with a GPU that is there for minutes run on a CPU, too, at toy sizes."""

import csv
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT
from engine_cases import make_image_folder

pytestmark = pytest.mark.slow

STUDY = """# Two normalizers on three colours
axes: {norm: [bn, en]}
set: [model=resnet18, model.name=test_resnet, data=imagefolder, "data.root=${oc.env:EXNORM_DATA}/colours",
  data.image_size=32, data.resize=32, data.workers=0, batch=1x8, ops.backend=eager, trainer.epochs=1]
seeds: 1
"""


def run(script: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a script that has to succeed."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_visit_measures_and_keeps_what_its_parts_say(tmp_path: Path) -> None:
    others = [f"{part} {norm}" for part in ("speed", "whole") for norm in ("bn", "sn", "gn")]
    left_out = ("warm", "tests", *others, "whole stock", "whole en", "layers", "train", "host stock", "profile stock")
    done = run("gpu_visit.py", tmp_path, "--dry", "--skip", *left_out)
    parts = ("facts", "speed stock", "speed en", "profile en", "host en")
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == [f"{part}: exit 0" for part in parts]
    rows = list(csv.DictReader((tmp_path / "gpu.csv").read_text(encoding="utf-8").splitlines()))
    speeds = {row["part"] for row in rows if row["images_per_s"] and float(row["images_per_s"]) > 0}
    assert speeds >= {"speed stock", "speed en"} and all(row["commit"] for row in rows)
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        assert set(logs.getnames()) == {f"{part.replace(' ', '_')}.log" for part in parts}


def test_a_study_fits_into_the_time_and_goes_on_from_its_record(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "colours")
    with tarfile.open(tmp_path / "data.tgz", "w:gz") as archive:
        archive.add(tmp_path / "colours", "colours")
    study, out = tmp_path / "mine.yaml", tmp_path / "out"
    study.write_text(STUDY, encoding="utf-8")
    options = (out, "--data", tmp_path / "data.tgz", "--study", study, "--scale", "mini", "--jobs", "1")
    for seconds in ("20", "22"):  # less than a start takes, and about as much
        assert "[1/" not in run("gpu_study.py", *options, "--seconds", seconds).stdout
    assert not any("norm=" in file.read_text() for file in (out / "records").glob("mine*"))
    one = run("gpu_study.py", *options, "--seconds", "300", "--only", "norm=en")
    assert "[1/1] norm=en, seed 0" in one.stdout
    assert (out / "records" / "mine.csv").read_text().count("norm=en")
    rest = run("gpu_study.py", *options, "--seconds", "300")
    assert "[1/1] norm=bn, seed 0" in rest.stdout and "norm=en" not in rest.stdout
