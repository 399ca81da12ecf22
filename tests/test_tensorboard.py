"""TensorBoard has the rows of metrics.jsonl, each once, also after a kill, and in a TensorBoard that is open."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, CliRunner
from engine_cases import checkpoints, make_image_folder, only_run, start, tiny, train, wait_for, workers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from exnorm.runs.folder import RunFolder
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.sinks import Sinks, make_sinks

LOGGER = {"csv": False, "wandb": "off", "sinks": {"tb": {"_target_": "exnorm.runs.tensorboard.TensorBoardSink"}}}


def opened(run: Path) -> EventAccumulator:
    """What TensorBoard reads from a run folder, with all points."""
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def shown(events: EventAccumulator) -> list[tuple[str, int, float]]:
    """All points in an order that does not depend on the file's."""
    names = events.Tags()["scalars"]
    return sorted((name, point.step, point.value) for name in names for point in events.Scalars(name))


def logged(run: Path) -> list[tuple[str, int, float]]:
    """The points that metrics.jsonl has."""
    rows = MetricsLog.read(run / "metrics.jsonl")
    points = [(key, row["step"], value) for row in rows for key, value in row.items() if key != "step"]
    return sorted(point for point in points if point[2] is not None)


def assert_shows_what_is_logged(events: EventAccumulator, run: Path) -> None:
    """TensorBoard stores numbers in single precision."""
    left, right = shown(events), logged(run)
    assert right and [point[:2] for point in left] == [point[:2] for point in right]
    assert [point[2] for point in left] == pytest.approx([point[2] for point in right], rel=1e-6)


def log(sinks: Sinks, run: Path, row: dict[str, Any], step: int) -> None:
    """Log a row as the trainer does."""
    MetricsLog(run / "metrics.jsonl").append({"step": step, **row})
    sinks.log(row, step)


def test_rows_are_scalars_each_once_also_after_a_kill(tmp_path: Path) -> None:
    """The rows after the checkpoint are gone, of those at its step the one that is repeated."""
    folder = RunFolder(tmp_path)
    first = make_sinks(folder, LOGGER, run_config={"batch": "8x32", "norm": {"name": "en"}})
    log(first, tmp_path, {"epoch": 1, "batch/loss": 2.5}, 100)
    log(first, tmp_path, {"epoch": 1, "val/top1": 10.0, "ratio/layer1.0.bn1/in": 0.3, "images_per_s": None}, 200)
    log(first, tmp_path, {"epoch": 2, "batch/loss": math.nan}, 300)
    log(first, tmp_path, {"epoch": 2, "val/top1": 20.0}, 400)
    log(first, tmp_path, {"epoch": 3, "batch/loss": 0.5}, 500)
    is_open = opened(tmp_path)
    assert_shows_what_is_logged(is_open, tmp_path)  # without close: a kill may come at any time

    MetricsLog(folder.metrics_file).cut_back(400, 1)
    second = make_sinks(folder, LOGGER, run_config={})
    assert_shows_what_is_logged(opened(tmp_path), tmp_path)
    log(second, tmp_path, {"epoch": 2, "val/top1": 21.0}, 400)
    second.close()
    for events in (opened(tmp_path), is_open.Reload()):
        assert_shows_what_is_logged(events, tmp_path)
        assert [point.value for point in events.Scalars("val/top1")] == [10, 21]
    for _ in range(3):
        make_sinks(folder, LOGGER, run_config={})
    assert_shows_what_is_logged(opened(tmp_path), tmp_path)
    assert len(list(folder.tensorboard_dir.iterdir())) == 2, "an earlier file, and the last"


def test_the_configuration_is_a_text(tmp_path: Path) -> None:
    make_sinks(RunFolder(tmp_path), LOGGER, run_config={"norm": {"name": "en"}, "data": {"root": "a\udc80b"}})
    events = opened(tmp_path)
    (event,) = events.Tensors("config")
    assert event.tensor_proto.string_val[0].decode().splitlines()[:2] == ["    norm:", "      name: en"]
    assert events.SummaryMetadata("config").plugin_data.plugin_name == "text"


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").touch()
    sinks = make_sinks(RunFolder(tmp_path), LOGGER)
    sinks.log({"loss": 1.0}, 1)
    sinks.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "logger tb could not start" in line and "tensorboard cannot be written" in line


def test_without_the_package_is_one_line_before_the_run(tmp_path: Path, run_cli: CliRunner) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise ModuleNotFoundError('no tensorboard')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_cli("train", "logger=[csv,tensorboard]", env={"PYTHONPATH": path})
    assert done.returncode == 2
    line = "exnorm: error: logger=tensorboard needs the package tensorboard. Type pip install 'exnorm[tensorboard]'\n"
    assert done.stderr == line and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_and_resumed_run_shows_what_is_logged(tmp_path: Path) -> None:
    """After SIGKILL, and after the rows that came after the checkpoint were cut back."""
    words = ["logger=[csv,tensorboard]", "trainer.epochs=4", "trainer.checkpoint_every=2", "batch=1x4", "norm=en"]
    arguments = tiny(make_image_folder(tmp_path / "images"), *words)
    cwd = tmp_path / "here"
    cwd.mkdir()
    process = start(arguments, cwd)
    wait_for(lambda: any(cwd.glob("runs/*/*/checkpoints/step-*.pt")) or process.poll() is not None, "a checkpoint")
    for pid in [*workers(str(cwd)), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not workers(str(cwd)), "the workers' end")
    run = only_run(cwd)
    assert checkpoints(run) and not (run / "record.json").exists()
    assert_shows_what_is_logged(opened(run), run)
    train(arguments, cwd)
    assert_shows_what_is_logged(opened(run), run)
    assert any(name.startswith("ratio/") for name, _, _ in shown(opened(run)))
