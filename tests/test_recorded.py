"""`exnorm reproduce --skip-recorded`: what the records have is left out, and copied if another study has it."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from study_cases import own_study, put, row

from exnorm.config.study import load_study
from exnorm.runs.records import COLUMNS, Row, change_records, read_records, record_file
from exnorm.studies.plan import Job, jobs_of
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
    """All rows, the cell aside, stay as they are. A plan copies nothing."""
    norms = ("bn", "gn", "sn", "en")
    copy_records(("sn-norms", "sn-table2"), tmp_path)
    drop(tmp_path, "sn-norms", *(f"norm={norm}" for norm in norms))
    study = load_study("sn-norms", "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    assert len(lacking(study, jobs, tmp_path)) == 20
    before = record_file(tmp_path, "sn-norms").read_bytes()
    assert left_of_all(study, jobs, tmp_path, copy=False) == []
    assert record_file(tmp_path, "sn-norms").read_bytes() == before
    assert left_of_all(study, jobs, tmp_path, copy=True) == []
    assert lacking(study, jobs, tmp_path) == []
    for kind in ("runs", "epochs"):
        theirs, ours = (
            [row for row in read_records(tmp_path, name, kind) if row["scale"] == "mini"]
            for name in ("sn-table2", "sn-norms")
        )
        for norm in norms:
            cell = f"norm={norm}"
            wanted = [row for row in theirs if row["cell"] == f"{cell} batch=8x32" and int(row["seed"]) < 5]
            assert [row for row in ours if row["cell"] == cell] == [row | {"cell": cell} for row in wanted] != []


def test_a_result_without_the_ratios_by_layer_that_a_study_asks_for_is_measured(tmp_path: Path) -> None:
    copy_records(("sn-norms", "sn-table2"), tmp_path)
    norms = ("bn", "gn", "sn", "en")
    drop(tmp_path, "sn-table2", *(f"norm={norm} batch=8x32" for norm in norms))
    study = load_study("sn-table2", "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    left = [job.title for job in left_of_all(study, jobs, tmp_path, copy=True)]
    assert left == ["norm=sn batch=8x32, seed 0", "norm=en batch=8x32, seed 0"]


FOUR = (
    'axes: {words: {a: [norm=bn], b: [norm=bn], c: [norm=bn, "eval:calibration_batches=2"], '
    "w: [norm=bn, model.init_from=w.pt]}}\nseeds: 1\nlayers_of: [{words: b}]"
)


def result(job: Job, value: float = 80.0, **more: str) -> Row:
    return row(job.name, job.seed, value, config_hash=str(job.result_hash), **more)


def record(results: Path, study: str, rows: list[Row]) -> None:
    """Write results with a learning curve of one epoch each."""
    curve = dict.fromkeys(COLUMNS["epochs"], "1")
    epochs = [curve | {name: row[name] for name in ("scale", "cell", "seed")} for row in rows]
    change_records(results, study, lambda before: {kind: [] for kind in COLUMNS} | {"runs": rows, "epochs": epochs})


def test_cells_that_are_one_run_share_a_result(tmp_path: Path) -> None:
    """Neither an evaluation of the run, nor one of another seed or scale, nor what begins with a file is the same."""
    study = load_study(own_study(tmp_path, FOUR), "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    same, followed, evaluated, from_file = jobs
    record(tmp_path, "other", [result(same) | {"cell": "x"}, result(from_file) | {"cell": "y"}])
    assert left_of_all(study, jobs, tmp_path, copy=True) == [evaluated, from_file]
    assert lacking(study, jobs, tmp_path) == [evaluated, from_file]
    for other in ({"scale": "small"}, {"seed": "7"}):
        record(tmp_path, study.id, [])
        record(tmp_path, "other", [result(same) | {"cell": "x"} | other])
        assert left_of_all(study, jobs, tmp_path, copy=True) == jobs
    record(tmp_path, "other", [result(same, metric="ratio/bn") | {"cell": "x"}])
    assert followed in left_of_all(study, jobs, tmp_path, copy=False)  # its ratios by layer are not there


def test_a_run_that_ended_wins_over_one_that_diverged(tmp_path: Path) -> None:
    """And one that diverged has no curve, and is not trained again."""
    study = load_study(own_study(tmp_path, FOUR), "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    same = jobs[0]
    put(tmp_path, "z", [result(same, 7, metric="diverged_at") | {"cell": "x"}])
    assert [job.name for job in left_of_all(study, jobs, tmp_path, copy=False)] == ["words=c", "words=w"]
    record(tmp_path, "b", [result(same, 81.0) | {"cell": "x"}])
    record(tmp_path, "c", [result(same, 82.0) | {"cell": "x"}])
    left_of_all(study, jobs, tmp_path, copy=True)
    rows = read_records(tmp_path, study.id)
    assert [(line["cell"], line["metric"], line["value"]) for line in rows] == [
        ("words=a", "top1", "81.0"),
        ("words=b", "top1", "81.0"),
    ]


def test_a_result_whose_curve_is_lost_is_measured(tmp_path: Path) -> None:
    study = load_study(own_study(tmp_path, FOUR), "mini")
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    put(tmp_path, "other", [result(jobs[0]) | {"cell": "x"}])
    assert left_of_all(study, jobs, tmp_path, copy=False) == jobs
