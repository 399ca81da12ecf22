"""`exnorm reproduce --skip-recorded`: what the records have is left out, and copied if another study has it."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from study_cases import own_study, put, row

from exnorm.config.study import load_study
from exnorm.runs.records import change_records, record_file
from exnorm.studies.plan import jobs_of
from exnorm.studies.recorded import lacking, left_of_all

RESULTS = ROOT / "results"
KINDS = ("runs", "epochs", "layers")


@pytest.mark.parametrize("name", ["en-pi", "en-transfer", "sn-hard"])
def test_what_the_record_has_can_be_left_out(name: str, tmp_path: Path) -> None:
    """With its configuration of now, evaluation included. A source is left out if all that begin with it are."""
    study = load_study(name, "mini", seeds=1)
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    cells = [job for job in jobs if job.cell is not None]
    rows = [row(job.name, 0, 80.0) | {"config_hash": str(job.result_hash)} for job in cells]
    put(tmp_path, name, rows)
    without_looks = [job for job in cells if job.looks]  # their ratios by class are not in this record
    assert lacking(study, jobs, tmp_path) == without_looks
    put(tmp_path, name, [rows[0] | {"config_hash": "other"}, *rows[1:]])
    again = lacking(study, jobs, tmp_path)
    assert cells[0] in again and len([job for job in again if job.cell]) == len({cells[0], *without_looks})
    assert [job for job in again if job.cell is None] == [job for job in [cells[0].needs] if job is not None]


def test_a_plan_without_what_the_record_has(tmp_path: Path, cli_here: CliRunner) -> None:
    """Nothing may be left."""
    study = load_study("en-pi", "mini", seeds=1)
    jobs = jobs_of(study, study.cells, tmp_path)
    rows = [row(job.name, 0, 80.0) | {"config_hash": str(job.config_hash)} for job in jobs]
    for count in (1, len(rows)):
        put(tmp_path, "en-pi", rows[:count])
        done = cli_here("reproduce", "en-pi", "--seeds", "1", "--plan", "--skip-recorded", "--results", str(tmp_path))
        assert f"at scale mini: {len(jobs) - count} runs;" in done.stdout, done.stdout + done.stderr
        assert "in the record" not in done.stdout


def copy_records(names: tuple[str, ...], to: Path) -> None:
    (to / "records").mkdir()
    for name in names:
        for kind in KINDS:
            file = record_file(RESULTS, name, kind)
            if file.is_file():
                shutil.copy(file, to / "records")


def drop(results: Path, study: str, *cells: str) -> None:
    """Forget the results of some cells with seeds below 5."""
    change_records(
        results,
        study,
        lambda before: {
            kind: [row for row in rows if row["cell"] not in cells or int(row["seed"]) > 4]
            for kind, rows in before.items()
        },
    )


def test_results_that_another_study_has_are_copied(tmp_path: Path) -> None:
    """The record is then byte for byte what the runs themselves give. A plan copies nothing."""
    copy_records(("sn-norms", "sn-table2"), tmp_path)
    drop(tmp_path, "sn-norms", "norm=bn", "norm=gn", "norm=sn", "norm=en")
    study = load_study("sn-norms", "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    assert len(lacking(study, jobs, tmp_path)) == 20
    before = record_file(tmp_path, "sn-norms").read_bytes()
    assert left_of_all(study, jobs, tmp_path, copy=False) == []
    assert record_file(tmp_path, "sn-norms").read_bytes() == before
    assert left_of_all(study, jobs, tmp_path, copy=True) == []
    for kind in ("runs", "epochs"):
        copied, measured = (record_file(folder, "sn-norms", kind).read_bytes() for folder in (tmp_path, RESULTS))
        assert copied == measured
    assert lacking(study, jobs, tmp_path) == []


def test_a_result_without_the_ratios_by_layer_that_a_study_asks_for_is_measured(tmp_path: Path) -> None:
    copy_records(("sn-norms", "sn-table2"), tmp_path)
    norms = ("bn", "gn", "sn", "en")
    drop(tmp_path, "sn-table2", *(f"norm={norm} batch=8x32" for norm in norms))
    study = load_study("sn-table2", "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    left = [job.title for job in left_of_all(study, jobs, tmp_path, copy=True)]
    assert left == ["norm=sn batch=8x32, seed 0", "norm=en batch=8x32, seed 0"]


def test_cells_that_are_one_run_share_a_result(tmp_path: Path) -> None:
    study = load_study(
        own_study(tmp_path, "axes: {words: {a: [], b: [seed=0], c: [trainer.epochs=9]}}\nseeds: 2"), "mini"
    )
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    known = [job for job in jobs if job.name == "words=a"]
    put(tmp_path, study.id, [row(job.name, job.seed, 80.0) | {"config_hash": str(job.config_hash)} for job in known])
    left = left_of_all(study, jobs, tmp_path, copy=True)
    assert left == [job for job in jobs if job.name == "words=c"]
    assert lacking(study, jobs, tmp_path) == left


def test_a_result_of_another_scale_is_not_one_of_this(tmp_path: Path) -> None:
    copy_records(("sn-norms",), tmp_path)
    change_records(
        tmp_path,
        "sn-norms",
        lambda before: {kind: [row | {"scale": "small"} for row in rows] for kind, rows in before.items()},
    )
    study = load_study("sn-norms", "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    assert left_of_all(study, jobs, tmp_path, copy=True) == jobs
