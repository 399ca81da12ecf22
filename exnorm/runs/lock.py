"""Locks on files: one process at a time, on one machine or on several that share a file system.

The holder has the file locked (`flock`), and writes into it who it is. On one machine the kernel frees the lock when
the holder dies. Other machines may not see that, and some network file systems have no locks at all. So the holder also
touches the file every BEAT_S. On another machine the lock counts as free STALE_S after the last touch.

Where a file system has locks that only one machine sees, two machines that take a lock within the same second may both
get it. The next beat then ends one of the two processes.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exnorm.config.errors import UserError
from exnorm.runs.subprocesses import leave_to_parent

BEAT_S = 30.0
STALE_S = 180.0  # a few beats, and the minute for which NFS may show an earlier time
SETTLE_S = 2.0  # without flock, until one of several machines that wrote at the same time is the one
TRIES = 5  # a process that lists the runs holds a shared lock for an instant
PAUSE_S = 0.05
EXIT_LOST = 4
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Locked(UserError):
    """Another process holds the lock; the message says which process and since when."""


class FileLock:
    """An exclusive lock on a file, held from construction to `release` or to the end of a `with`.

    Raises:
        Locked: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._token = path, secrets.token_hex(8)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._handle)
            raise
        self._held = True
        self._released = threading.Event()
        leave_to_parent(self)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Release the lock; call this only once."""
        self._held = False
        self._released.set()
        with suppress(OSError):
            if _read(self._path).get("token") == self._token:
                os.truncate(self._path, 0)
        with suppress(OSError):
            os.close(self._handle)

    def _take(self) -> None:
        for _ in range(TRIES):
            kind = flock(self._handle, fcntl.LOCK_EX)
            if kind is not False:
                break
            time.sleep(PAUSE_S)
        else:
            raise Locked(holder(self._path))
        if _is_held_elsewhere(self._path, has_flock=bool(kind), clock=_time_there):
            raise Locked(holder(self._path))
        who = {"pid": os.getpid(), "host": socket.gethostname(), "started": utc_now(), "token": self._token}
        text = json.dumps(who).encode()
        if kind is True:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text, 0)
            os.fsync(self._handle)
            return
        part = self._path.with_name(f"{self._path.name}.{self._token}")
        part.write_bytes(text)
        part.replace(self._path)
        time.sleep(SETTLE_S)
        if _read(self._path).get("token") != self._token:
            raise Locked(holder(self._path))

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            who = _read(self._path)
            if who and who.get("token") != self._token:  # this machine slept, and another one took over
                cause = f"{self._path.parent} was taken over by {_named(who)}"
                print(f"exnorm: error: {cause}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)
            with suppress(OSError):
                os.utime(self._path)

    def close_in_child(self) -> None:
        """Leave the lock to the parent. Otherwise a loader process that outlives a killed trainer would keep it."""
        if self._held:
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock on a file inside the block; wait while another process holds it."""
    while True:
        try:
            lock = FileLock(path)
            break
        except Locked:
            time.sleep(PAUSE_S)
    with lock:
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file now."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        kind = flock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)
    return kind is False or _is_held_elsewhere(path, has_flock=bool(kind), clock=lambda path: time.time())


def flock(handle: int, operation: int) -> bool | None:
    """Lock an open file without waiting. Return whether it is locked now; None if the file system has no locks."""
    try:
        fcntl.flock(handle, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        return None
    return True


def holder(path: Path) -> str:
    """Return who holds a lock: process, machine, since when, and when it was last seen if that is elsewhere."""
    who = _read(path)
    if not who:
        return "another process"
    named = _named(who)
    if who.get("host") == socket.gethostname():
        return named
    seen_s = max(0, time.time() - _touched(path))
    return f"{named}, last seen {seen_s:.0f} s ago (it counts as dead after {STALE_S:.0f} s)"


def utc_now() -> str:
    """Return the time as `2026-01-31T12:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _is_held_elsewhere(path: Path, *, has_flock: bool, clock: Callable[[Path], float]) -> bool:
    """Return whether a process that flock does not show holds the lock: one of another machine, or without flock.

    Args:
        clock: returns the time at which a file would be written now.
    """
    who = _read(path)
    here = who.get("host") == socket.gethostname()
    if not who or (here and (has_flock or not is_running(who.get("pid")))):
        return False
    return clock(path) - _touched(path) < STALE_S


def is_running(pid: Any) -> bool:
    """Return whether a process of this machine has this number; False if it is no number."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return what the holder wrote; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _named(who: dict[str, Any]) -> str:
    return f"process {who.get('pid')} on {who.get('host')} since {who.get('started')}"


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _time_there(path: Path) -> float:
    """Return the time of the machine that has the file, whose clock may differ from the one here."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
