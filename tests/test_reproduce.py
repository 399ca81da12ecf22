"""`exnorm reproduce` with real trainings: killed and started again, with a run that fails, with evaluations."""

import csv
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import CLASSES, WAIT_S, make_image_folder, start, wait_for, workers

from exnorm.config.study import load_study
from exnorm.runs.folder import RunFolder, write_json_atomic
from exnorm.runs.records import COLUMNS, Row, record_file
from exnorm.studies.reproduce import Failed, Runner

TIMES = ("hours", "commit", "uncommitted")
TINY = """# Tiny networks on three colours
axes:
  norm: {{sn: [norm=sn], en: [norm=en]{more}}}
  inference: {{moving: [], batches: ["eval:inference=batch_average", "eval:calibration_batches=2"]}}
set:
  - model=resnet18
  - model.name=test_resnet
  - data=imagefolder
  - data.root={root}
  - data.image_size=32
  - data.resize=32
  - data.workers=0
  - data.noise.kind=symmetric_exclusive
  - data.noise.rate=0.4
  - batch=1x8
  - ops.backend=eager
  - trainer.epochs={epochs}
  - trainer.checkpoint_every_steps=2
  - "trainer.snapshots=[0.5]"
seeds: 1
layers_of: [{{norm: sn}}]
classes_of: [{{norm: en, inference: moving}}]
labels_of: [{{norm: en, inference: moving}}]
"""

pytestmark = pytest.mark.slow


def tiny_study(tmp_path: Path, more: str = "", *, epochs: int = 2, looks: bool = True) -> str:
    """The path of a study of seconds; `more` are further values of its first axis, `looks` the ratios of EN."""
    root = make_image_folder(tmp_path / "data")
    path = tmp_path / "tiny.yaml"
    text = TINY.format(root=root, more=more, epochs=epochs)
    path.write_text(text if looks else text.partition("classes_of")[0], encoding="utf-8")
    return str(path)


def records(results: Path, kind: str = "runs") -> list[Row]:
    """The rows of the tiny study's record, without what differs from one time to the next."""
    with open(record_file(results, "tiny", kind), encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row.get("metric") != "images_per_s"]


def begin(study: str, folder: Path, *more: str) -> "subprocess.Popen[str]":
    """Start the study with runs and records in a folder."""
    folder.mkdir(exist_ok=True)
    return start(["reproduce", study, "--jobs", "2", *more], folder)


def test_killed_twice_and_started_again_it_writes_the_same_record(
    reproduce_here: Callable[..., None], tmp_path: Path
) -> None:
    """By SIGKILL, which takes the workers with it, then by SIGTERM, which leaves checkpoints and says how to go on."""
    study = tiny_study(tmp_path)
    reproduce_here(study, tmp_path / "whole")
    broken = tmp_path / "broken"
    killed = begin(study, broken)
    wait_for(lambda: list(broken.glob("runs/*/*/checkpoints/step-*.pt")), "a first checkpoint")
    killed.kill()
    killed.communicate()
    wait_for(lambda: not workers(str(broken)), "the end of the workers")
    stopped = begin(study, broken)
    wait_for(lambda: list(broken.glob("runs/*/*/record.json")), "a first finished run")
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=600)
    assert " of 4 runs are done" in out
    assert stopped.returncode == 143 and "Type the same command again" in err
    again = begin(study, broken)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert re.search(r"\[(\d)/\1\]", out)
    for kind in COLUMNS:
        assert records(broken / "results", kind) == records(tmp_path / "whole" / "results", kind) != []
    cells = {row["cell"] for row in records(broken / "results")}
    assert len(cells) == 4
    by_class = records(broken / "results", "classes")
    assert {row["epoch"] for row in by_class} == {"1", "2"} and {row["class"] for row in by_class} == {*CLASSES}
    by_label = records(broken / "results", "labels")
    assert {row["cell"] for row in by_label} == {"norm=en inference=moving"} and by_label[-1]["layer"] == "loss"

    (log,) = broken.glob("runs/*/*-sn-*/metrics.jsonl")
    whole_log = log.read_text(encoding="utf-8")
    log.write_text(whole_log.splitlines(keepends=True)[0], encoding="utf-8")  # the first of two epochs
    damaged = begin(study, broken)
    _, err = damaged.communicate(timeout=WAIT_S)
    lines = err.splitlines()
    assert damaged.returncode == 1 and all("The record is left as it is" in line for line in lines), err
    assert [line[: line.index(":", 8)] for line in lines] == [
        f"failed: norm=sn inference={rule}, seed 0" for rule in ("moving", "batches")
    ]
    log.write_text(whole_log, encoding="utf-8")

    plan = begin(study, broken, "--plan")
    out, _ = plan.communicate(timeout=WAIT_S)
    assert "2 runs and 2 evaluations of them; 2 runs done, 0 and 0 evaluations left: 0.0 hours" in out


def test_two_commands_divide_the_runs_and_one_finishes_those_of_a_killed_one(tmp_path: Path) -> None:
    """No run is started twice, unless its first process was killed."""
    study, here = tiny_study(tmp_path, looks=False), tmp_path / "here"
    here.mkdir()
    # Two tasks of srun, which is how a cluster starts a command several times.
    tasks = [{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    both = [start(["reproduce", study, "--jobs", "1"], here, task) for task in tasks]
    results = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    trained = [
        {line.split("]")[1].split(",")[0] for line in out.splitlines() if line.startswith("[")} for out, _ in results
    ]
    assert all(trained) and len(trained[0] | trained[1]) == 4
    starts = [json.loads(path.read_text()) for path in here.glob("runs/*/*/provenance.json")]
    assert len(starts) == 2 and not any(start["resumed"] for start in starts)
    evaluations = [path.read_text().count("\n") for path in here.glob("runs/*/*/evaluations.jsonl")]
    assert evaluations == [1] * 2
    assert len({row["cell"] for row in records(here / "results")}) == 4

    shutil.rmtree(here / "runs")
    cells = ("--only", "inference=moving")
    both = [start(["reproduce", study, "--jobs", "1", *cells], here) for _ in range(2)]
    wait_for(lambda: len(list(here.glob("runs/*/*/checkpoints/step-*.pt"))) > 1, "two runs")
    both[0].kill()
    both[0].communicate()
    _, err = both[1].communicate(timeout=600)
    assert both[1].returncode == 0, err
    assert len(list(here.glob("runs/*/*/record.json"))) == 2


def test_a_run_that_another_study_has_finished_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two studies start a run at the same instant. The one without the lock ends when the other has finished."""
    folder = RunFolder(tmp_path)

    def loses(*_: object) -> None:
        folder.create("seed: 0")
        write_json_atomic(folder.record_file, {"val/top1": 1.0})
        raise Failed("is in use by process 1")

    monkeypatch.setattr(Runner, "_exnorm", loses)
    runner = Runner(load_study("sn-table2", "mini"), tmp_path, [])
    job: Any = None
    runner._try_to_train(folder, [], job)
    folder.record_file.unlink()
    monkeypatch.setattr(Runner, "_exnorm", lambda *_: (_ for _ in ()).throw(Failed("broken")))
    with pytest.raises(Failed, match="broken"):
        runner._try_to_train(folder, [], job)


def test_a_finished_run_that_lost_its_configuration_gets_it_again(
    reproduce_here: Callable[..., None], tmp_path: Path
) -> None:
    """The numbers are those of the same training, which is not repeated."""
    study = tiny_study(tmp_path)
    reproduce_here(study, tmp_path / "here", "--only", "norm=sn")
    before = records(tmp_path / "here" / "results")
    shutil.rmtree(tmp_path / "here" / "results")
    (file,) = tmp_path.glob("here/runs/*/*/config.yaml")
    config = file.read_text(encoding="utf-8")
    file.unlink()
    reproduce_here(study, tmp_path / "here", "--only", "norm=sn")
    assert file.read_text(encoding="utf-8") == config
    assert records(tmp_path / "here" / "results") == before != []
    start = json.loads(file.with_name("provenance.json").read_text(encoding="utf-8"))
    assert start["resumed"] == []


def test_submitted_jobs_write_the_record(tmp_path: Path) -> None:
    """On submitit's local cluster, whose jobs are processes: one for each run, with the evaluations of it."""
    study, here = tiny_study(tmp_path), tmp_path / "here"
    process = begin(study, here, "--only", "norm=sn", "--submit", "cluster=local", "--submit", "timeout_min=20")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "1 job queued" in out and "norm=sn inference=moving, seed 0; norm=sn inference=batches, seed 0" in out

    def complete() -> bool:
        file = record_file(here / "results", "tiny")
        return file.is_file() and len({row["cell"] for row in records(here / "results")}) == 2

    wait_for(complete, "the record of two cells")
    wrong = begin(study, here, "--submit", "cluster=local", "--submit", "timeout=20")
    _, err = wrong.communicate(timeout=600)
    assert wrong.returncode == 2 and err.count("\n") == 1 and "timeout" in err


def test_a_study_on_a_ray_cluster_survives_kills_and_stops(tmp_path: Path) -> None:
    """On a cluster of this machine. The death of the command ends the tasks; SIGTERM stops them with checkpoints."""
    study, here = tiny_study(tmp_path, epochs=20), tmp_path / "here"  # Ray ends the tasks a moment after the command
    on_ray = ("--ray", "--only", "norm=sn", "--only", "inference=moving")
    killed = begin(study, here, *on_ray)
    wait_for(lambda: list(here.glob("runs/*/*/checkpoints/step-*.pt")), "a first checkpoint")
    killed.kill()
    killed.communicate()
    wait_for(lambda: not workers(str(here)), "the end of the workers")
    stopped = begin(study, here, *on_ray)
    wait_for(lambda: workers(str(here)), "a worker")
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=600)
    assert stopped.returncode == 143 and "Type the same command again" in err
    assert not workers(str(here))
    again = begin(study, here, *on_ray)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert re.search(r"Ray cluster: 1 machines; each run has 0 GPUs and \d+ cores", out)
    assert len({row["cell"] for row in records(here / "results")}) == 1
    (start,) = [json.loads(path.read_text()) for path in here.glob("runs/*/*/provenance.json")]
    assert start["resumed"]
    assert not list(here.glob("runs/.claims/stop-*"))
    refused = begin(study, here, "--ray", "--gpus-per-run", "3")
    _, err = refused.communicate(timeout=600)
    assert refused.returncode == 2
    assert err == "exnorm: error: --gpus-per-run 3: a machine of this Ray cluster has at most 0 GPUs\n"


def test_a_run_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, ", wild: [norm=bn, optim.lr=1e30]")
    process = begin(study, tmp_path / "here", "--only", "inference=moving", "--only", "norm=sn,wild")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("failed: norm=wild inference=moving, seed 0: the loss is not finite at step")
    found = records(tmp_path / "here" / "results")
    (diverged,) = (row for row in found if row["cell"] == "norm=wild inference=moving")
    assert diverged["metric"] == "diverged_at" and f"at step {diverged['value']}; remove" in line
    again = begin(study, tmp_path / "here", "--only", "norm=wild", "--only", "inference=moving")
    _, err = again.communicate(timeout=600)
    assert again.returncode == 1 and err.strip() == line  # a result, too: it is not tried until it passes
    folder = next((tmp_path / "here").glob(f"runs/*/{diverged['run']}"))
    assert not json.loads((folder / "provenance.json").read_text())["resumed"]
    assert {row["cell"] for row in found if row["metric"] == "top1"} == {"norm=sn inference=moving"}


def test_data_that_change_during_a_study_end_it_with_their_reason(tmp_path: Path) -> None:
    """The second run then lands in another folder; its training ends well, and the study does not start it for ever."""
    study, here = tiny_study(tmp_path), tmp_path / "here"
    cells = ("--only", "inference=moving", "--only", "norm=sn,en", "--jobs", "1")
    process = begin(study, here, *cells)
    wait_for(lambda: list(here.glob("runs/*/*/log.txt")), "the first run")
    folder = tmp_path / "data" / "train" / "cat"
    shutil.copy(folder / "0.jpg", folder / "new.jpg")
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert "norm=en inference=moving, seed 0" in line and "the data or the initial weights have changed" in line
    again = begin(study, here, "--plan", *cells)
    out, _ = again.communicate(timeout=WAIT_S)
    assert "2 runs; 1 runs done" in out  # what was trained with the new data counts as that
