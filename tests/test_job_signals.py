"""What a cluster and a terminal send: signals to every process of a job, warnings before its end, a closed terminal."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from engine_cases import WAIT_S, checkpoints, environment, make_image_folder, metrics, only_run, start, tiny, wait_for

pytestmark = pytest.mark.slow
LONG = ("trainer.epochs=500", "data.workers=1", "logger=offline", "batch=1x4")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images", train=160)


def descendants(pid: int) -> list[int]:
    """The process and everything that it started, however often."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def wait_for_epoch(cwd: Path, epoch: int) -> None:
    """Wait until an epoch has been validated, so that all loaders and the logger run."""

    def reached() -> bool:
        files = list(cwd.glob("runs/*/*/metrics.jsonl"))
        return bool(files) and any("val/top1" in row and row["epoch"] >= epoch for row in metrics(files[0].parent))

    wait_for(reached, f"the end of epoch {epoch}")


def file_time_ns(cwd: Path) -> int:
    """The time that a file gets if it is written now; `time.time_ns()` is some milliseconds ahead of it."""
    (cwd / "now").touch()
    return (cwd / "now").stat().st_mtime_ns


def train_processes(pid: int) -> list[int]:
    """The loader processes below a controller."""
    named = [found for found in descendants(pid)[2:] if b"engine.worker" in Path(f"/proc/{found}/cmdline").read_bytes()]
    assert len(named) == 2, "one loader for training, one for validation"
    return named


def test_sigterm_to_a_whole_job_saves_a_checkpoint_under_the_default_logger(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM preempts a job. W&B starts threads in each loader after 100 steps, so validation's has them."""
    monkeypatch.delenv("WANDB_MODE")  # `logger=offline` alone, as users have it
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no network in a test
    process = start(tiny(images, *LONG), tmp_path)
    wait_for_epoch(tmp_path, 1)
    loaders = train_processes(process.pid)
    for pid in loaders:
        os.kill(pid, signal.SIGTERM)
    wait_for_epoch(tmp_path, len([row for row in metrics(only_run(tmp_path)) if "val/top1" in row]) + 1)
    assert train_processes(process.pid) == loaders, "a signal to a loader alone is none to the training"

    now_ns = file_time_ns(tmp_path)
    for pid in reversed(descendants(process.pid)):
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, err
    assert "Traceback" not in err and "DataLoader" not in err
    assert checkpoints(only_run(tmp_path))[-1].stat().st_mtime_ns > now_ns


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR2,),
        (signal.SIGHUP,),
    ],
)
def test_a_warning_of_the_scheduler_saves_a_checkpoint(
    signals: tuple[signal.Signals, ...], images: Path, tmp_path: Path
) -> None:
    """To the whole job; the end itself may follow before the checkpoint is written."""
    process = start(tiny(images, "trainer.epochs=500", "data.workers=1"), tmp_path)
    wait_for_epoch(tmp_path, 1)
    now_ns = file_time_ns(tmp_path)
    for pid in reversed(descendants(process.pid)):
        os.kill(pid, signals[0])
    for signum in signals[1:]:
        process.send_signal(signum)
        time.sleep(0.01)  # two of a kind at once are one
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + signals[0], err
    assert "Traceback" not in err
    assert checkpoints(only_run(tmp_path))[-1].stat().st_mtime_ns > now_ns


def test_a_closed_terminal_saves_a_checkpoint(images: Path, tmp_path: Path) -> None:
    """As when ssh ends: the session's leader gets SIGHUP, and nothing can be printed any more."""
    parent, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "exnorm", *tiny(images, "trainer.epochs=500")],
        cwd=tmp_path,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    threading.Thread(target=drain, args=(os.dup(parent), stop := threading.Event()), daemon=True).start()
    wait_for_epoch(tmp_path, 1)
    now_ns = file_time_ns(tmp_path)
    stop.set()
    os.close(parent)
    assert process.wait(WAIT_S) == 128 + signal.SIGHUP
    assert checkpoints(only_run(tmp_path))[-1].stat().st_mtime_ns > now_ns


def drain(terminal: int, stop: threading.Event) -> None:
    """Read what a terminal shows until it is closed."""
    while not stop.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)


def test_nohup_keeps_a_run_going(images: Path, tmp_path: Path) -> None:
    """SIGHUP stays ignored where the user asked for that; other signals work as ever."""
    command = ["nohup", sys.executable, "-m", "exnorm", *tiny(images, "trainer.epochs=500")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for_epoch(tmp_path, 1)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGHUP)
    epoch = max(row["epoch"] for row in metrics(only_run(tmp_path)))
    wait_for_epoch(tmp_path, epoch + 2)
    process.terminate()
    assert process.wait(WAIT_S) == 143


def test_a_run_goes_on_when_nobody_reads_what_it_prints(images: Path, tmp_path: Path) -> None:
    """As in `exnorm train | head -2`: all lines are in log.txt, and the run ends well."""
    command = [sys.executable, "-m", "exnorm", *tiny(images, "trainer.epochs=3", "data.workers=1")]
    options = {"cwd": tmp_path, "env": environment(), "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WAIT_S) == 0
    assert (only_run(tmp_path) / "record.json").is_file()
    assert "epoch 3/3: train loss" in (only_run(tmp_path) / "log.txt").read_text()
