"""How `exnorm reproduce` spreads a study: over the cores here, over the jobs of a cluster, and what it may not miss."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CliRunner
from data_cases import SMALL, WNIDS, make_imagenet
from study_cases import row

from exnorm.config.study import load_study
from exnorm.runs.records import COLUMNS, change_records
from exnorm.studies import submit
from exnorm.studies.collect import collect, in_order, stale_rows
from exnorm.studies.plan import Job, jobs_of
from exnorm.studies.reproduce import Failed, Runner, reproduce

WAIT_S = 20
RULES = '{m: [], b: ["eval:inference=batch_average"], c: ["eval:inference=moving_average"]}'


def own_study(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(f"# A study of mine\nset: [data=digits]\n{text}", encoding="utf-8")
    return str(path)


def test_cells_that_share_a_run_do_not_keep_cores_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cells evaluate each of two runs; with two cores both runs are under way at once."""
    study = load_study(own_study(tmp_path, f"axes: {{norm: [bn, sn], rule: {RULES}}}\nseeds: 1"), "mini")
    both = threading.Barrier(2)
    order: list[str] = []

    def run(self: Runner, job: Job) -> None:
        if job.cell is not None and not job.cell.evaluate:
            both.wait(WAIT_S)
        order.append(job.name)

    monkeypatch.setattr(Runner, "run", run)
    assert reproduce(study, jobs_of(study, study.cells, tmp_path / "runs"), tmp_path, at_once=2) == 0
    for norm in ("bn", "sn"):
        assert [name for name in order if f"norm={norm}" in name] == [f"norm={norm} rule={rule}" for rule in "mbc"]


def test_what_begins_with_a_run_that_failed_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is named with its reason, and other seeds go on."""
    study = load_study("sn-hard", "mini", seeds=2)
    ran: list[tuple[str, int]] = []

    def run(self: Runner, job: Job) -> None:
        ran.append((job.name, job.seed))
        if job.cell is None and job.seed == 0:
            raise Failed("no memory")

    monkeypatch.setattr(Runner, "run", run)
    assert reproduce(study, jobs_of(study, study.cells, tmp_path / "runs"), tmp_path, at_once=3) == 1
    assert sorted(seed for _, seed in ran) == [0, *[1] * 7]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "failed: source soft, seed 0: no memory"
    assert len(lines) == 7 and all("seed 0: the run that it begins with failed" in line for line in lines[1:])


def test_a_training_that_failed_is_not_tried_for_each_of_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_study(own_study(tmp_path, f"axes: {{norm: [bn], rule: {RULES}}}\nseeds: 1"), "mini")
    tried: list[str] = []

    def run(self: Runner, job: Job) -> None:
        tried.append(job.name)
        raise Failed("no memory")

    monkeypatch.setattr(Runner, "run", run)
    assert reproduce(study, jobs_of(study, study.cells, tmp_path / "runs"), tmp_path, at_once=2) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(tried) == 1 and len(lines) == 3 and all(line.endswith("seed 0: no memory") for line in lines)


class Queue:
    """Stands for submitit's executor."""

    def __init__(self) -> None:
        self.commands: list[list[list[str]]] = []

    def submit(self, job: submit.Commands) -> Any:
        self.commands.append(job.commands)
        return type("Queued", (), {"job_id": str(len(self.commands))})


def test_no_job_of_a_cluster_waits_for_another_ones_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six runs that begin with one source a seed, one job trains the source; the others are left for later."""
    queue, study = Queue(), load_study("sn-hard", "mini", seeds=2)
    monkeypatch.setattr(submit, "_executor", lambda *_: queue)
    submit.submit(study, jobs_of(study, study.cells, tmp_path), tmp_path, tmp_path, [])
    lines = capsys.readouterr().out.splitlines()
    assert len(queue.commands) == 2 and lines[-1].startswith("2 jobs queued")
    later = [line for line in lines if line.startswith("not queued")]
    assert len(later) == 10 and later[0].endswith("needs what job 1 trains. Submit again after it")


def test_a_record_keeps_its_order_at_other_scales() -> None:
    """Those may leave out cells of this one; the file must not change without a measurement."""
    mini, small = (load_study("en-imagenet", scale) for scale in ("mini", "small"))
    rows = [row(cell.name, seed, 1.0) for cell in mini.cells for seed in (2, 10, 0)]
    rows += [row(cell.name, seed, 1.0, scale="small") for cell in small.cells for seed in (1, 0)]
    ordered = in_order(small, in_order(mini, rows[::-1]))
    assert [line["scale"] for line in ordered] == ["mini"] * (3 * len(mini.cells)) + ["small"] * (2 * len(small.cells))
    assert [line["cell"] for line in ordered[::3]][: len(mini.cells)] == [cell.name for cell in mini.cells]
    assert [line["seed"] for line in ordered[:3]] == ["0", "2", "10"] and ordered[-1]["seed"] == "1"


def test_numbers_of_evaluations_that_changed_are_found(tmp_path: Path) -> None:
    """The run is the same and so is its hash, the numbers are not."""
    before, after = (
        load_study(own_study(tmp_path, f"axes: {{rule: {{m: [], b: [{setting}]}}}}\nseeds: 1"), "mini")
        for setting in (
            '"eval:calibration_batches=3", "eval:inference=batch_average"',
            '"eval:inference=batch_average"',
        )
    )
    old, new = jobs_of(before, before.cells, tmp_path), jobs_of(after, after.cells, tmp_path)
    assert len({job.config_hash for job in (*old, *new)}) == 1
    keys = ({"scale": "mini", "cell": job.name, "seed": "0", "config_hash": str(job.result_hash)} for job in old)
    rows = [{**dict.fromkeys(COLUMNS["runs"], "1"), "metric": "top1", "value": "80", **key} for key in keys]
    change_records(tmp_path, "mine", lambda before: {**before, "runs": rows})
    assert collect(before, old, tmp_path) == ([], {})
    (line,), _ = collect(after, new, tmp_path)
    assert "rule=b, seed 0: made with the configuration" in line


def test_results_of_settings_that_changed_are_found(tmp_path: Path, cli_here: CliRunner) -> None:
    """A number stays in the record until it is measured again, but the check does not pass over it."""
    study = load_study("en-pi", "mini", seeds=2)
    rows = []
    for job in jobs_of(study, study.cells[:2], tmp_path):
        values = {"scale": "mini", "cell": job.name, "seed": str(job.seed), "metric": "top1", "value": "80"}
        rows.append(dict.fromkeys(COLUMNS["runs"], "1") | values | {"config_hash": str(job.config_hash)})
    change_records(tmp_path, "en-pi", lambda before: {**before, "runs": rows})
    assert stale_rows(tmp_path) == []
    rows[0]["config_hash"], rows[-1]["cell"] = "0ld0ld00", "pi=7"
    change_records(tmp_path, "en-pi", lambda before: {**before, "runs": rows})
    first, last = stale_rows(tmp_path)
    assert "pi=1, seed 0: made with the configuration 0ld0ld00" in first
    assert "pi=7, seed 1: en-pi no longer has this cell" in last
    done = cli_here("results", str(tmp_path), "--check")
    assert done.returncode == 1 and first in done.stdout


@pytest.mark.slow
def test_excluded_images_reach_the_footnotes_of_a_study(
    tmp_path: Path, run_cli: CliRunner, reproduce_here: Callable[..., None]
) -> None:
    """An accuracy on fewer images is another number, whether the run measured it or an evaluation of the run."""
    root = make_imagenet(tmp_path / "in")
    first = {split: sorted((root / split / WNIDS[0]).iterdir())[:count] for split, count in (("train", 2), ("val", 1))}
    excluded = tmp_path / "bad.txt"
    excluded.write_text("".join(f"{file.relative_to(root)}\n" for files in first.values() for file in files))
    fast = ["model=resnet18", "model.name=test_resnet", "logger=off", "ops.backend=eager", "norm=bn", "batch=1x4"]
    settings = ["data=imagenet", f"data.root={root}", f"data.exclude={excluded}", "trainer.epochs=1", *SMALL, *fast]
    axes = "axes: {rule: {own: [], average: ['eval:inference=batch_average', 'eval:calibration_batches=2']}}"
    study = tmp_path / "mine.yaml"
    study.write_text(f"# A study of mine\nset: {settings}\n{axes}\nseeds: 1\nmetrics: [top1]\n", encoding="utf-8")
    reproduce_here(study, tmp_path)
    lines = [line for line in run_cli("table", study).stdout.splitlines() if "Settings" in line]
    assert len(lines) == 2
    assert all("excluded_train_images=2 excluded_val_images=1" in line for line in lines), lines
