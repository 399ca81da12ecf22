"""Signals, cores, environment and end of the processes that exnorm starts. Imports no torch."""

import ctypes
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
END_WITH_PARENT = "EXNORM_END_WITH_PARENT"  # set for a command that must end when its standard input closes

# Each asks for a checkpoint and an end. They come from Ctrl-C, from a scheduler that ends a job or warns before that
# (SLURM's --signal, which submitit sets to SIGUSR2), and from a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """Return the stop signals that this process handles: all but a SIGHUP that `nohup` told it to ignore."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signum for signum in STOP_SIGNALS if not (signum is signal.SIGHUP and ignores_hangup)]


def say_in_handler(text: str) -> None:
    """Print a line on stderr from a signal handler, where print() is not safe and the terminal may be closed."""
    with suppress(OSError):
        os.write(2, f"\nexnorm: {text}\n".encode())


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block stop signals in processes that are started inside the block; this process receives them afterwards.

    A scheduler signals every process of a job at once. The processes that the trainer needs for its checkpoint must
    survive that. The mask is set before the fork, because libraries start threads in a forked process before exnorm's
    code runs in it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not Linux: a loader process could not be told to end
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LeftToParent(Protocol):
    """What holds a file or a connection that a forked process, such as a loader, must not keep."""

    def close_in_child(self) -> None:
        """Close it in this process, which was forked; the parent keeps it."""
        ...


_left: weakref.WeakSet[LeftToParent] = weakref.WeakSet()


def leave_to_parent(holder: LeftToParent) -> None:
    """Call `close_in_child` of a holder in each process that is forked from now on, as long as the holder exists."""
    _left.add(holder)


def _close_in_child() -> None:
    for holder in list(_left):
        holder.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_here() -> int:
    """The training processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def importing_environment() -> dict[str, str]:
    """Return the environment for a Python process that can import the same modules as this one.

    The current folder is left out unless PYTHONPATH names it or exnorm is in it. Otherwise a user's `timm/` or `dis.py`
    there would replace the module of that name.
    """
    here, package = os.getcwd(), str(Path(__file__).resolve().parents[2])
    asked_for = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    wanted = [path for path in sys.path if path and (os.path.abspath(path) != here or here in asked_for)]
    if package not in wanted:
        wanted.append(package)
    return os.environ | {"PYTHONPATH": os.pathsep.join(wanted), "PYTHONSAFEPATH": "1"}


def end_with_parent() -> None:
    """End this process at once when its standard input closes, which happens when its parent dies for any reason."""
    threading.Thread(target=_wait_for_end_of_input, daemon=True).start()


def end_with_process(parent: int) -> None:
    """Let the kernel kill this process when the parent that forked it dies, however it dies. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it has died before
            os._exit(1)


def _wait_for_end_of_input() -> None:
    # The descriptor, not sys.stdin: loader processes are forked, and a buffer's lock held here would be held there.
    while os.read(0, 1):
        pass
    os._exit(1)
