"""The processes of one injection. They are found by a variable that each inherits in its environment. Linux only."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

MARK = "EXNORM_FAULT_CASE"
WORKER = "exnorm.engine.worker"
GONE_S = 40.0  # until a process that has to end by itself counts as left behind
ROLES = ("controller", "worker", "loader", "service")


def alive(mark: str) -> dict[int, str]:
    """Return the processes with a mark and their roles: controller, worker, loader, service (W&B's) or other."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and _state(entry) != "Z":
                found[int(entry.name)] = _role(entry)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def kill(pids: list[int], signum: int = signal.SIGKILL) -> None:
    """Signal processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def kill_all(mark: str) -> None:
    """End all processes with a mark."""
    wait_until(lambda: not _killed(mark), GONE_S)


def left_behind(mark: str, wait_s: float = GONE_S) -> dict[int, str]:
    """Return the processes that are still there after some time."""
    wait_until(lambda: not alive(mark), wait_s)
    return alive(mark)


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Poll until a condition holds; return whether it does."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _killed(mark: str) -> dict[int, str]:
    found = alive(mark)
    kill(list(found), signal.SIGCONT)
    kill(list(found))
    return found


def _role(entry: Path) -> str:
    command = _command(entry)
    if "wandb" in command:
        return "service"
    if WORKER in command:
        parent = Path("/proc") / (entry / "stat").read_text().rpartition(")")[2].split()[1]
        return "loader" if WORKER in _command(parent) else "worker"
    return "controller" if "-m exnorm" in command else "other"


def _command(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]
