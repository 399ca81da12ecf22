"""The option `logger`: lists of sinks, names for usual lists, sinks from outside, and its mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, CliRunner
from engine_cases import WAIT_S, checkpoints, make_image_folder, metrics, start, tiny, train_here
from omegaconf import OmegaConf

from exnorm.config.compose import compose_train, default_values
from exnorm.config.errors import UserError
from exnorm.runs.folder import RunFolder
from exnorm.runs.identity import config_hash
from exnorm.runs.sinks import check_classes, make_sinks

PLUGIN = ROOT / "examples" / "plugin"
NAMES = "csv, off, offline, online, tensorboard, wandb"


def logger(*overrides: str) -> dict[str, Any]:
    """The composed values of the group."""
    values = OmegaConf.to_container(compose_train(list(overrides)).logger)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("logger=off", ["logger=[]"]),
        ("logger=offline", ["logger=[csv,wandb]"]),
        ("logger=offline", ["logger=[wandb,csv]"]),
        ("logger=online", ["logger=[csv,wandb]", "logger.wandb=online"]),
        ("logger=[offline,tensorboard]", ["logger=[csv,wandb,tensorboard]"]),
        ("logger=tensorboard", ["logger=[tensorboard]"]),
        ("logger.wandb=off", ["logger=csv"]),  # offline is the default
    ],
)
def test_a_name_is_the_same_as_its_list(name: str, other: list[str]) -> None:
    assert logger(name) == logger(*other)


def test_the_earlier_names_set_what_they_did() -> None:
    def old(*overrides: str) -> tuple[Any, ...]:
        values = logger(*overrides)
        assert not values["sinks"]
        return values["csv"], values["wandb"], values["project"], values["probe_images"]

    assert old() == old("logger=offline") == (True, "offline", "exnorm", 64)
    assert old("logger=online", "logger.project=mine") == (True, "online", "mine", 64)
    assert old("logger=off", "logger.probe_images=0") == (False, "off", "exnorm", 0)
    assert old("logger=off", "logger.csv=true") == (True, "off", "exnorm", 64)


@pytest.mark.parametrize("word", ["logger=[csv,tensorboard]", "logger=[]", "logger=my_package.MySink"])
def test_loggers_are_no_part_of_a_runs_identity(word: str) -> None:
    def hash8(*overrides: str) -> str:
        values: Any = OmegaConf.to_container(compose_train(list(overrides)), resolve=True)
        return config_hash(values, defaults=default_values("en"), fingerprint="f")

    assert hash8(word) == hash8()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("logger=nope", f"unknown logger 'nope': allowed: {NAMES}"),
        ("logger=[csv,tensorbord]", f"unknown logger 'tensorbord': did you mean 'tensorboard'? allowed: {NAMES}"),
        ("logger=[csv,csv]", "logger=[csv,csv] has csv more than once. Give each logger once"),
        ("logger=[off,csv]", "logger=[off,csv]: off does not go with other loggers. Leave out off"),
        (
            "logger=[offline,csv]",
            "logger=[offline,csv]: offline and csv both set logger.csv. Leave out one of them",
        ),
        ("logger=[1]", "logger=[1]: give names, such as logger=csv or 'logger=[csv,tensorboard]'"),
        ("logger=null", "logger=null: give names, such as logger=csv or 'logger=[csv,tensorboard]'"),
        (
            "logger=csv,tensorboard",
            "logger=csv,tensorboard has several values. Add -m to run one after the other, or for a list type "
            "'logger=[csv,tensorboard]'",
        ),
        (
            "logger=my_package.MySink logger.sinks.MySink.url=x",
            "unknown key 'logger.sinks.MySink.url'. To pass another argument to a sink, add a plus, such as "
            "+logger.sinks.MySink.url=VALUE",
        ),
        (
            "+logger.sinks.mine.url=x",
            "logger.sinks.mine: write _target_: my_package.MySink, and its options as further keys; it has _target_: "
            "None",
        ),
    ],
)
def test_a_mistake_is_one_line(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_train(words.split())
    assert str(caught.value) == line


def test_train_takes_lists_and_sweeps_over_lists(run_cli: CliRunner) -> None:
    done = run_cli("train", "logger=[csv,tensorboard]", "--cfg", "job")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["logger"]["csv"] is True, done.stderr
    done = run_cli("train", "-m", "logger=[csv],[csv,tensorboard],tensorboard", "batch=3x")  # composed, then refused
    assert "(job 1: logger=[csv,tensorboard])" in done.stderr and "(job 2: logger=tensorboard)" in done.stderr
    done = run_cli("train", "-m", "logger=[csv],[csv,nope]", "batch=3x")
    assert done.returncode == 2 and done.stderr == f"exnorm: error: unknown logger 'nope': allowed: {NAMES}\n"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of a package, as if it were installed."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setenv("EXNORM_CONF", str(PLUGIN / "exnorm_rms" / "conf"))


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("logger=[csv,latest]", "latest.json"),
        ("logger=[csv,latest] logger.sinks.latest.file=row.json", "row.json"),
        ("logger=[csv,exnorm_rms.latest.LatestRow] +logger.sinks.LatestRow.file=row.json", "row.json"),
    ],
)
def test_a_sink_of_another_package(words: str, file: str, tmp_path: Path) -> None:
    """By the name of its yaml, with options, and by the name of its class."""
    config = logger(*words.split())
    check_classes(config["sinks"])
    made = make_sinks(RunFolder(tmp_path), config, run_config={})
    made.log({"loss": 1.0}, 1)
    made.log({"loss": float("nan")}, 2)
    made.close()
    assert json.loads((tmp_path / file).read_text()) == {"step": 2, "loss": None}
    assert (tmp_path / "metrics.csv").is_file() is False, "the CSV copies metrics.jsonl, which has no rows here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("logger=pathlib.Path", "logger.sinks.Path: Path is no sink. It needs the methods log, table and close"),
        ("logger=my_sinks.Missing", "logger.sinks.Missing._target_=my_sinks.Missing cannot be imported as a class"),
        (
            "logger=[csv,latest] +logger.sinks.latest.fiel=x",
            "logger.sinks.latest: LatestRow(folder, run_config, ...): got an unexpected keyword argument 'fiel'",
        ),
    ],
)
@pytest.mark.usefixtures("plugin")
def test_a_sink_that_cannot_be_made_is_one_line_before_the_run(
    words: str, said: str, tmp_path: Path, cli_here: CliRunner
) -> None:
    done = cli_here(*tiny(tmp_path / "data"), *words.split())
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_from_before_sinks_resumes_and_a_failing_sink_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is that of the same command with other loggers, and it ends with the same metrics."""
    arguments = tiny(make_image_folder(tmp_path / "data"), "norm=bn")
    run = train_here(arguments, tmp_path)
    rows = metrics(run)
    (run / "record.json").unlink()
    checkpoints(run)[-1].unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["logger"]["sinks"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert logger_of(run) == {}
    monkeypatch.setitem(sys.modules, "faulty", type(sys)("faulty"))
    sys.modules["faulty"].Sink = Faulty  # type: ignore[attr-defined]
    capsys.readouterr()
    again = train_here([*arguments, "logger=[csv,faulty.Sink]"], tmp_path)
    assert again == run and metrics(run) == rows
    assert re.findall("warning: (.*)", capsys.readouterr().err) == [
        "logger Sink could not log (no). The run continues without it"
    ]
    assert (run / "metrics.csv").read_text().count("\n") == 1 + len(rows)


def logger_of(run: Path) -> Any:
    """The further sinks of a run, as a worker reads them."""
    from exnorm.engine.checkpoint import read_config

    return read_config(RunFolder(run)).logger.sinks


class Faulty:
    """A sink that fails always."""

    def __init__(self, folder: RunFolder, run_config: dict[str, Any]) -> None:
        pass

    def log(self, *values: Any) -> None:
        raise RuntimeError("no")

    table = close = log


SLOW = """
import time
class Slow:
    def __init__(self, folder, run_config):
        self.file = folder.path / "closed.txt"
    def log(self, row, step): pass
    def table(self, name, columns, rows, step): pass
    def close(self, exit_code=0):
        time.sleep(3)
        self.file.write_text(str(exit_code))
"""


@pytest.mark.slow
def test_a_slow_sink_is_closed_after_an_error_on_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers without sinks end at once; the first one still has time."""
    (tmp_path / "slow_sink.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    arguments = tiny(make_image_folder(tmp_path / "data"), "batch=2x4", "trainer.devices=2", "optim.lr=1e30")
    process = start([*arguments, "logger=[slow_sink.Slow]"], tmp_path)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2 and "not finite" in err and err.count("\n") == 1, err
    (closed,) = tmp_path.glob("runs/*/*/closed.txt")
    assert closed.read_text() == "1"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's service in /proc")
def test_a_wandb_that_hangs_is_given_up_and_the_run_goes_on(tmp_path: Path) -> None:
    """Its service answers no more. Without a limit, the run would wait for ever, with its record not written."""
    code = (
        "import os, signal, sys\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from exnorm.runs import sinks, wandb_service\n"
        "from exnorm.runs.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1])\n"
        "folder.create('')\n"
        "start = partial(sinks.WandbSink, folder, mode='offline', project='p', config={})\n"
        "guarded = sinks.Sinks({'W&B': start})\n"
        "guarded._running['W&B'].limit_s = 3.0\n"
        "send = os.kill\n"
        "wandb_service.os.kill = lambda pid, signum: send(pid, signal.SIGSTOP)\n"
        "wandb_service.end_service()\n"
        "wandb_service.os.kill = send\n"
        "guarded.log({'loss': 1.0}, 1)\n"
        "guarded.close()\n"
        "print('ended')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("exnorm: ")]
    assert "W&B could not finish" in line and "Traceback" not in done.stderr
