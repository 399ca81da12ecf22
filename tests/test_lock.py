"""Locks between machines that share a file system. The machines are processes that say other names."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_cases import environment, wait_for

from exnorm.runs import lock
from exnorm.runs.lock import FileLock, Locked, alone, is_locked

pytestmark = pytest.mark.slow
HOLDER = """
import fcntl, socket, sys, time
from pathlib import Path
from exnorm.runs import lock
path, host, sees_flock = sys.argv[1:]
socket.gethostname = lambda: host
lock.BEAT_S, lock.STALE_S, lock.SETTLE_S = 0.05, 2.0, 1.0
if sees_flock == "without":  # as some network file systems
    lock.flock = lambda handle, operation: None
try:
    held = lock.FileLock(Path(path))
except lock.Locked as problem:
    print("refused", problem, flush=True)
    sys.exit(1)
if sees_flock == "alone":  # a lock that only its own machine sees
    fcntl.flock(held._handle, fcntl.LOCK_UN)
print("locked", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def holders() -> "list[subprocess.Popen[str]]":
    """Processes that hold a lock; they are killed at the end of the test."""
    return []


@pytest.fixture(autouse=True)
def _no_process_stays(holders: "list[subprocess.Popen[str]]", monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(lock, "STALE_S", 2.0)
    yield
    for holder in holders:
        with holder:
            holder.kill()


def start(holders: "list[subprocess.Popen[str]]", path: Path, host: str, kind: str) -> "subprocess.Popen[str]":
    """Start a process that takes the lock."""
    command = [sys.executable, "-c", HOLDER, str(path), host, kind]
    pipe = subprocess.PIPE
    holders.append(subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True))
    return holders[-1]


def first_line(holder: "subprocess.Popen[str]") -> str:
    """Wait for the first line that a process prints."""
    assert holder.stdout is not None
    return holder.stdout.readline()


@pytest.mark.parametrize("kind", ["alone", "without"])
def test_the_lock_of_another_machine_holds_while_it_lives_and_for_a_stated_time(
    kind: str, holders: "list[subprocess.Popen[str]]", tmp_path: Path
) -> None:
    path = tmp_path / ".lock"
    other = start(holders, path, "other", kind)
    assert first_line(other) == "locked\n"
    end = time.monotonic() + 2 * lock.STALE_S
    while time.monotonic() < end:
        assert is_locked(path)
        with pytest.raises(
            Locked, match=rf"process {other.pid} on other since \S+, last seen \d s ago .*dead after 2 s"
        ):
            FileLock(path)
        time.sleep(0.2)
    other.kill()
    other.wait()
    assert is_locked(path)
    wait_for(lambda: not is_locked(path), "the time after which the other machine counts as dead")
    with alone(path):  # its clock is that of the file, some milliseconds behind
        assert is_locked(path)
    assert not is_locked(path)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_of_machines_that_start_at_the_same_time_one_gets_the_lock(
    holders: "list[subprocess.Popen[str]]", tmp_path: Path
) -> None:
    """On a file system without locks."""
    found = [start(holders, tmp_path / ".lock", f"host{number}", "without") for number in range(4)]
    lines = [first_line(holder) for holder in found]
    assert lines.count("locked\n") == 1, lines
    (winner,) = (number for number, line in enumerate(lines) if line == "locked\n")
    assert all(f"on host{winner}" in line for number, line in enumerate(lines) if number != winner), lines


def test_a_machine_that_slept_ends_when_another_one_took_over(
    holders: "list[subprocess.Popen[str]]", tmp_path: Path
) -> None:
    path = tmp_path / ".lock"
    sleeper = start(holders, path, "sleeper", "alone")
    assert first_line(sleeper) == "locked\n"
    sleeper.send_signal(signal.SIGSTOP)
    wait_for(lambda: not is_locked(path), "the time after which the sleeper counts as dead")
    with alone(path):  # its clock is that of the file, some milliseconds behind
        sleeper.send_signal(signal.SIGCONT)
        _, err = sleeper.communicate(timeout=600)
    assert sleeper.returncode == 4 and err.count("\n") == 1
    assert f"was taken over by process {lock.os.getpid()} on {socket.gethostname()}" in err


def test_a_dead_process_of_this_machine_holds_nothing(holders: "list[subprocess.Popen[str]]", tmp_path: Path) -> None:
    """Also where the file system has no locks."""
    path = tmp_path / ".lock"
    other = start(holders, path, socket.gethostname(), "without")
    assert first_line(other) == "locked\n"
    same = start(holders, path, socket.gethostname(), "without")
    assert first_line(same).startswith(f"refused process {other.pid} on ")
    other.kill()
    other.wait()
    third = start(holders, path, socket.gethostname(), "without")
    assert first_line(third) == "locked\n"
