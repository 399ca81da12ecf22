"""What the tests share: the command line as a subprocess, a browser, W&B kept offline, GPU tests only with a GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not any(Path("/dev").glob("nvidia*")):  # a test that needs compiled layers says so: they take long to compile
    os.environ.setdefault("EXNORM_BACKEND", "eager")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_S = 600  # a hang, not a slow machine: the longest training of the tests takes a small part of it
CliRunner = Callable[..., subprocess.CompletedProcess[str]]


def varied(values: Iterable[Any], *, always: Sequence[Any] = ()) -> list[Any]:
    """Values of a parameter of a test. Those that are not in `always` are slow: `make exhaustive` alone runs them."""
    marks = [pytest.mark.slow, pytest.mark.exhaustive]

    def one(value: Any) -> Any:
        return value if value in always else pytest.param(*value if isinstance(value, tuple) else [value], marks=marks)

    return [one(value) for value in values]


def pytest_configure(config: pytest.Config) -> None:
    """Show each failure at once, too: of a suite that is stopped later, nothing else tells what failed."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(ShowFailures(config))


class ShowFailures:
    """Writes the text of a failed test when it fails."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid} failed\n{report.longreprtext}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none; torch is imported only if there are such tests."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def no_network_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test never logs to the W&B account of whoever runs it."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def run_cli(tmp_path: Path) -> CliRunner:
    """Return `run_cli(*arguments, cwd=tmp_path, env={}, timeout_s=600)`: `exnorm ARGUMENTS` in a process of its own.

    `env` is added to the environment. The result has `returncode`, `stdout` and `stderr`; no exit code raises.
    """

    def run(
        *arguments: str | Path, cwd: Path = tmp_path, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "exnorm", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "120"} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def cli_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CliRunner:
    """`run_cli` in this process, for commands that need torch: it takes longer to import than they take to run."""
    from engine_cases import working_here

    from exnorm.cli import app, explained

    def run(*arguments: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `exnorm train` sets it; here it is put back afterwards
        capsys.readouterr()
        try:
            with working_here():
                code = app([*map(str, arguments)], prog_name="exnorm", standalone_mode=False) or 0
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        except Exception as problem:
            if not explained(problem):
                raise
            code = 2
        return subprocess.CompletedProcess([*map(str, arguments)], code, *capsys.readouterr())

    return run


@pytest.fixture
def reproduce_here(cli_here: CliRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `reproduce_here(study, folder, *options)`: a study with its commands in this process, as in `cli_here`."""
    from exnorm.runs.provenance import STUDY
    from exnorm.studies.reproduce import Runner

    def run(study: str | Path, folder: Path, *more: str) -> None:
        def execute(_: Runner, arguments: list[str], variables: Mapping[str, str]) -> tuple[int, list[str]]:
            with mock.patch.dict(os.environ, {STUDY: variables[STUDY]}):
                done = cli_here(*arguments, cwd=folder)
            return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]

        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "execute", execute)
            done = cli_here("reproduce", study, "--jobs", "1", *more, cwd=folder)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: make browser installs it where apt-get is")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
