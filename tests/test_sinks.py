"""The copies of the metrics: a CSV file that grows columns, W&B, and no sink that stops a run."""

import csv
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import make_image_folder, tiny, train_here

from exnorm.config.errors import UserError
from exnorm.engine.stopping import Stopped
from exnorm.runs import sinks
from exnorm.runs.folder import RunFolder
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.sinks import CsvSink, Sinks, WandbSink, make_sinks

LOGGER = {"csv": True, "wandb": "off", "project": "p", "sinks": {}}
SEEN: dict[str, list[Any]] = {}  # what each `Witness` was called with, by its name


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def csv_of(folder: RunFolder) -> Callable[[dict[str, Any], int], None]:
    """What logs a row as the trainer does: into metrics.jsonl, then into a CSV file that has just been opened."""
    log, made = MetricsLog(folder.metrics_file), make_sinks(folder, LOGGER)

    def write(row: dict[str, Any], step: int) -> None:
        log.append({"step": step, **row})
        made.log(row, step)

    return write


class Witness:
    """A sink of another package; it writes down what it is called with, and fails where it is told to."""

    def __init__(self, folder: RunFolder, run_config: dict[str, Any], *, name: str, fails: str = "") -> None:
        self.name, self.fails = name, fails
        SEEN[name] = []
        self._note("start", run_config)

    def log(self, row: dict[str, Any], step: int) -> None:
        self._note("log", row.get("loss"), step)
        row.clear()

    def table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self._note("table", rows, step)

    def close(self, exit_code: int = 0) -> None:
        self._note("close", exit_code)

    def _note(self, what: str, *values: Any) -> None:
        SEEN[self.name].append((what, *values))
        if what == self.fails:
            raise ERRORS[what]


ERRORS = {
    "start": MemoryError(),
    "log": OSError(28, "No space left on device", "/a/file"),
    "table": SystemExit("two\nlines"),
    "close": UnicodeDecodeError("utf-8", b"", 0, 1, "reason"),
}


def test_a_new_metric_is_a_new_column(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = csv_of(folder)
    log({"loss": 1.0}, 1)
    log({"top1": 2.0, "note": "a,b"}, 2)
    csv_of(folder)({"loss": float("nan")}, 3)
    assert read_csv(folder.csv_file) == [
        {"step": "1", "loss": "1.0", "top1": "", "note": ""},
        {"step": "2", "loss": "", "top1": "2.0", "note": "a,b"},
        {"step": "3", "loss": "", "top1": "", "note": ""},
    ]


def test_csv_is_cut_back_on_resume_and_drops_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = csv_of(folder)
    for step in (1, 2, 3):
        log({"epoch": 1, "loss": step / 2}, step)
    log({"epoch": 1, "val/top1": 50.0}, 2)
    with open(folder.csv_file, "a") as stream:
        stream.write("4,2")
    MetricsLog(folder.metrics_file).cut_back(2, 0)
    csv_of(folder)({"loss": 9.0}, 3)
    assert [(row["step"], row["loss"]) for row in read_csv(folder.csv_file)] == [
        ("1", "0.5"),
        ("2", "1.0"),
        ("3", "9.0"),
    ]


SAVED_AGAIN = {
    "semicolons": b"step;epoch;loss\r\n1;1;0,5\r\n2;1;1,0\r\n",
    "UTF-16": "step\tepoch\tloss\n1\t1\t0.5\n".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbfstep,epoch,loss\n1,1,0.5\n2,1,1.0\n",
    "Latin-1": "step,epoch,loss,größe\n1,1,0.5,\n".encode("latin-1"),
    "steps as floats": b"step,epoch,loss\n1.0,1.0,0.5\n2.0,1.0,1.0\n",
    "empty": b"",
    "a column too few": b"step,loss\n1,0.5,1\n",
}


@pytest.mark.parametrize("how", SAVED_AGAIN)
def test_a_csv_that_somebody_saved_again_stops_no_run_and_is_made_anew(tmp_path: Path, how: str) -> None:
    """While the run goes on and where it is resumed; metrics.jsonl has the metrics."""
    folder = RunFolder(tmp_path)
    log = csv_of(folder)
    log({"epoch": 1, "loss": 0.5}, 1)
    folder.csv_file.write_bytes(SAVED_AGAIN[how])
    log({"epoch": 1, "val/top1": 50.0}, 2)  # a new column
    folder.csv_file.write_bytes(SAVED_AGAIN[how])
    csv_of(folder)({"epoch": 2, "loss": 2.0}, 3)
    rows = read_csv(folder.csv_file)
    assert [(row["step"], row["loss"], row["val/top1"]) for row in rows] == [
        ("1", "0.5", ""),
        ("2", "", "50.0"),
        ("3", "2.0", ""),
    ]


def test_a_csv_that_cannot_be_written_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    log = csv_of(folder)
    folder.csv_file.mkdir()
    for step in (1, 2, 3):
        log({"loss": 1.0}, step)
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.csv cannot be written" in line and len(MetricsLog.read(folder.metrics_file)) == 3


def test_a_table_is_a_file_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    CsvSink(folder.csv_file, truth=folder.metrics_file).table("ratio/all", ["layer", "in"], [["bn1", 0.5]], step=7)
    assert read_csv(tmp_path / "tables" / "ratio_all.csv") == [{"step": "7", "layer": "bn1", "in": "0.5"}]


class FakeRun:
    """Records what is logged, or raises from the method named."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.logged: list[tuple[dict[str, Any], int]] = []

    starting_step = 4

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.broken == "log":
            raise OSError("disk full\nand more")
        self.logged.append((row, step))

    def finish(self) -> None:
        if self.broken == "finish":
            raise TimeoutError


def fake_wandb(monkeypatch: pytest.MonkeyPatch, *, broken: str = "", key: bool = False) -> dict[str, Any]:
    """Put a module in wandb's place; return what `init` is called with."""
    called: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        if broken == "init":
            raise RuntimeError("no service")
        called.update(arguments, run=FakeRun(broken))
        return called["run"]

    module = types.SimpleNamespace(
        init=init,
        login=lambda **options: key,
        Settings=lambda **options: options,
        Table=lambda columns, data: (columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return called


@pytest.mark.parametrize(
    ("fails", "line"),
    [
        ("start", "logger bad could not start (MemoryError)"),
        ("log", "logger bad could not log (/a/file cannot be written: No space left on device)"),
        ("table", "logger bad could not log a table (two)"),
        ("close", "logger bad could not finish ('utf-8' codec can't decode bytes in position 0-0: reason)"),
    ],
)
def test_a_failing_sink_is_one_warning_and_the_others_get_everything(
    fails: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it changes a row. It is called once more, to close it."""
    entries = {name: {"_target_": "test_sinks.Witness", "name": name} for name in ("first", "bad", "last")}
    entries["bad"]["fails"] = fails
    made = make_sinks(RunFolder(tmp_path), {**LOGGER, "sinks": entries}, run_config={"a": 1})
    for step in (1, 2):
        MetricsLog(tmp_path / "metrics.jsonl").append({"step": step, "loss": step / 2})
        made.log({"loss": step / 2}, step)
        made.table("t", ["a"], [[1]], step)
    made.close(130)
    then = "" if fails == "close" else ". The run continues without it"
    assert capsys.readouterr().err == f"exnorm: warning: {line}{then}\n"
    table = ("table", [[1]])
    everything = [("start", {"a": 1}), ("log", 0.5, 1), (*table, 1), ("log", 1.0, 2), (*table, 2), ("close", 130)]
    assert SEEN["first"] == SEEN["last"] == everything
    assert [row["loss"] for row in read_csv(tmp_path / "metrics.csv")] == ["0.5", "1.0"]
    calls = [call[0] for call in everything]
    after = [] if fails == "start" else ["close"]
    assert [call[0] for call in SEEN["bad"]] == [*calls[: calls.index(fails) + 1], *after]


def test_a_sink_hears_how_the_run_ends(tmp_path: Path) -> None:
    """Also by an error: so a logger can write the rows that it holds back, or tell its server that the run failed."""
    logger = ("logger=[test_sinks.Witness]", "+logger.sinks.Witness.name=run")
    arguments = tiny(make_image_folder(tmp_path / "data"), "norm=bn", *logger)
    train_here(arguments, tmp_path)
    assert SEEN["run"][-1] == ("close", 0)
    with pytest.raises(UserError, match="not finite"):
        train_here([*arguments, "optim.lr=1e30"], tmp_path)
    assert SEEN["run"][-1] == ("close", 1)
    with pytest.raises(Stopped), Sinks({"run": lambda: Witness(RunFolder(tmp_path), {}, name="run")}):
        raise Stopped(signal.SIGTERM)
    assert SEEN["run"][-1] == ("close", 143)


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    fake_wandb(monkeypatch, broken=broken)
    made = make_sinks(RunFolder(tmp_path), {**LOGGER, "wandb": "offline"})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.append({"step": step, "loss": 1.0})
        made.log({"loss": 1.0}, step)
    made.table("t", ["a"], [[1]], step=2)
    made.close()
    assert len(read_csv(tmp_path / "metrics.csv")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("exnorm: warning: W&B could not")


def test_a_wandb_that_cannot_be_imported_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    made = make_sinks(RunFolder(tmp_path), {**LOGGER, "csv": False, "wandb": "offline"})
    made.log({"loss": 1.0}, 1)
    made.table("t", ["a"], [[1]], step=1)
    made.close()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("asked", "key", "mode"), [("online", False, "offline"), ("online", True, "online")])
def test_wandb_is_online_only_with_a_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    key: bool,
    mode: str,
) -> None:
    called = fake_wandb(monkeypatch, key=key)
    WandbSink(RunFolder(tmp_path), mode=asked, project="p", config={"a": 1})
    assert called["mode"] == mode and called["config"] == {"a": 1}
    assert called["dir"] == str(tmp_path) and called["settings"]["console"] == "off"
    assert ("no key" in capsys.readouterr().err) is not key


def test_the_steps_of_wandb_never_fall_and_its_id_lasts_as_long_as_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = fake_wandb(monkeypatch)
    sink = WandbSink(RunFolder(tmp_path), mode="offline", project="p", config={})
    for step in (3, 5, 4, 6):
        sink.log({}, step)
    steps = [step for _, step in called["run"].logged]
    assert steps == [4, 5, 5, 6], "a resumed W&B run begins at its last step"
    first = called["id"]
    WandbSink(RunFolder(tmp_path), mode="offline", project="p", config={})
    assert called["id"] == first
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    WandbSink(RunFolder(tmp_path), mode="offline", project="p", config={})
    assert called["id"] != first


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="off, offline or online"):
        make_sinks(RunFolder(tmp_path), {**LOGGER, "wandb": "on"})


def test_wandb_is_not_imported_before_it_is_used() -> None:
    code = f"import sys, {sinks.__name__}; assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
