"""Start workers, forward signals to them, and report how they ended. Imports no torch."""

import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from exnorm.config.errors import UserError
from exnorm.engine.stopping import EXIT_TIME_UP
from exnorm.engine.worker import CONTROLLED, ERROR_FILE, EXIT_LOCKED, EXIT_USER_ERROR
from exnorm.runs.folder import RunFolder, RunLocked
from exnorm.runs.subprocesses import STOP_SIGNALS, heeded_signals, importing_environment, say_in_handler

FIND_GPUS = """
import json, torch
count, problem = torch.cuda.device_count(), ""
try:
    torch.cuda.init()
except Exception as error:
    count, problem = 0, str(error).strip().splitlines()[0]
print(json.dumps([count, problem]))
"""
POLL_S = 0.1
GRACE_S = 30  # after one worker stopped, until the others are killed
CRASH_GRACE_S = 1.0  # after one crashed
CLOSE_GRACE_S = 5.0  # after another one than the first, which closes the loggers, refused
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}  # torch requires it
EXIT_STOPPED = (EXIT_TIME_UP, *(128 + signum for signum in STOP_SIGNALS))


def run_workers(
    arguments: list[str], *, count: int, on_gpu: bool, resumes: RunFolder | None, deterministic: bool = False
) -> None:
    """Run `count` workers to their end. They end if this process dies for any reason.

    Args:
        resumes: the run that they train; after a signal they save a checkpoint. None: they end at once.
        deterministic: their matrix products on a GPU give the same bits each time.

    Raises:
        UserError: a worker refused its settings, or failed.
        RunLocked: another process uses the run folder.
        SystemExit: 128 + n, after the workers ended because of signal n; EXIT_TIME_UP, because their time was up.
    """
    with tempfile.TemporaryDirectory(prefix="exnorm-") as scratch:
        port = _free_port()
        added = ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}) | (CUBLAS if deterministic else {})
        workers = [_start(arguments, rank, count, port, Path(scratch), added) for rank in range(count)]
        try:
            with _forwarding(workers, resumes):
                failed = _wait(workers)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
                assert worker.stdin is not None
                worker.stdin.close()
        if failed is not None:
            _explain(failed, workers[failed].returncode, Path(scratch), resumes)


def visible_gpus() -> int:
    """Return the number of GPUs that workers will see."""
    return _find_gpus()[0]


def missing_gpu() -> str:
    """Return the reason why workers will see no GPU."""
    return _find_gpus()[1]


@functools.cache
def _find_gpus() -> tuple[int, str]:
    """Return the number of GPUs that torch can use, and its reason if there are none; nvidia-smi may be wrong."""
    if sys.platform == "linux" and not os.path.exists("/dev/kfd"):  # AMD's driver
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:  # importing torch, which takes seconds, would find the same
            return 0, "there is no NVIDIA driver, libcuda.so.1"
    return ask_torch_for_gpus()


def ask_torch_for_gpus() -> tuple[int, str]:
    """Return the GPUs that torch finds, in a subprocess, because the controller imports no torch."""
    done = subprocess.run(
        [sys.executable, "-c", FIND_GPUS], env=importing_environment(), capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return 0, (done.stderr.strip().splitlines() or ["python -c 'import torch' fails"])[-1]
    count, problem = json.loads(lines[-1])
    return count, problem


def _start(
    arguments: list[str], rank: int, count: int, port: int, scratch: Path, added: dict[str, str]
) -> subprocess.Popen[bytes]:
    environment = {
        **importing_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        CONTROLLED: "1",
        ERROR_FILE: str(scratch / f"{rank:04d}"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # else a lost worker prints C++ frames
        **added,
    }
    command = [sys.executable, "-m", "exnorm.engine.worker", *arguments]
    # Its own session: Ctrl-C reaches only this process, which forwards it once.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all workers, or until one has failed and the others had some time; return the first failed one."""
    waited = threading.Event()
    failed: int | None = None
    failed_for = 0.0
    while True:
        codes = [worker.poll() for worker in workers]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
        refused = any(code in (EXIT_USER_ERROR, EXIT_LOCKED) for code in codes)
        crashed = any(code not in (None, 0, *EXIT_STOPPED) for code in codes)
        grace_s = CLOSE_GRACE_S if refused else CRASH_GRACE_S if crashed else GRACE_S
        if None not in codes or (refused and codes[0] is not None) or failed_for > grace_s:
            return failed
        waited.wait(POLL_S)
        failed_for += POLL_S if failed is not None else 0


@contextmanager
def _forwarding(workers: list[subprocess.Popen[bytes]], resumes: RunFolder | None) -> Iterator[None]:
    """Forward stop signals to the workers; the second Ctrl-C kills them.

    Other signals are often sent twice: `timeout` signals its command and then its group; SLURM warns before it ends a
    job.
    """
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL if received.count(signal.SIGINT) > 1 else signum)
        if len(received) == 1 and resumes is not None:
            say_in_handler(f"{signal.Signals(signum).name}: saving a checkpoint")

    if threading.current_thread() is not threading.main_thread():  # some launchers, which handle signals themselves
        yield
        return
    before = {signum: signal.signal(signum, forward) for signum in heeded_signals()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received and any(worker.returncode != 0 for worker in workers):
        say_stopped(resumes, 128 + received[0])
        raise SystemExit(128 + received[0])


def say_stopped(resumes: RunFolder | None, code: int) -> None:
    """Print that a run ended early, with this exit code, and what the same command does."""
    why = " before trainer.max_hours were over" if code == EXIT_TIME_UP else ""
    print(f"exnorm: stopped{why}{then(resumes)}", file=sys.stderr, flush=True)


def then(resumes: RunFolder | None) -> str:
    """Return what the same command does after a failure."""
    return "" if resumes is None else f"; the same command {resumes.continues()}"


def _explain(rank: int, code: int, scratch: Path, resumes: RunFolder | None) -> NoReturn:
    """Raise the exception that fits the end of the first failed worker."""
    lines = [file.read_text(encoding="utf-8", errors="surrogateescape") for file in sorted(scratch.iterdir())]
    if code == EXIT_LOCKED:
        raise RunLocked(lines[0])
    if lines:
        raise UserError(lines[0])
    if code == EXIT_TIME_UP:
        say_stopped(resumes, code)
    if code in EXIT_STOPPED:
        raise SystemExit(code)
    if code < 0:
        raise UserError(f"worker {rank} was killed by {signal.Signals(-code).name}{then(resumes)}")
    raise UserError(f"worker {rank} failed with exit code {code}. Its own message is above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
