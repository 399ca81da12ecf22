"""The folder of a run: its files, the lock on it, and the list of all runs.

config.yaml  provenance.json  metrics.jsonl (the truth)  record.json (final numbers, written last)
metrics.csv  wandb/  wandb-id.txt  checkpoints/  log.txt  error.txt (one line, while the last attempt failed)  .lock
noisy_labels.csv  bad_images.csv  evaluations.jsonl  class_ratios-*.csv (where there are such)
"""

import errno
import fcntl
import functools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exnorm.config.errors import UserError

NOT_FINITE = "the loss is not finite at step"  # what the error of a training that diverged begins with
NAMED = ("model", "norm", "data")
CONFIG_KEYS = {"trainer": dict, "batch": str, "seed": int, **dict.fromkeys(NAMED, dict)}  # that every run has
LOCK_TRIES = 5  # somebody who lists the runs holds a shared lock for an instant
LOCK_PAUSE_S = 0.05
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunLocked(UserError):
    """Another process is writing into the run folder; the message says which and since when."""


class RunFolder:
    """The files of one run, by name. Nothing is created before `create` or `lock`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.provenance_file = self.path / "provenance.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.record_file = self.path / "record.json"
        self.error_file = self.path / "error.txt"
        self.checkpoints = self.path / "checkpoints"
        self.csv_file = self.path / "metrics.csv"
        self.noisy_labels_file = self.path / "noisy_labels.csv"
        self.bad_images_file = self.path / "bad_images.csv"
        self.wandb_dir = self.path / "wandb"
        self.wandb_id_file = self.path / "wandb-id.txt"
        self.log_file = self.path / "log.txt"
        self.lock_file = self.path / ".lock"

    def last_step(self) -> int | None:
        """The step of the last checkpoint; None where there is none."""
        names = [path.stem for path in self.checkpoints.glob("step-*.pt")]
        return max((int(name.removeprefix("step-")) for name in names), default=None)

    def continues(self) -> str:
        """What the same command does after a failure: it continues from the last checkpoint, or starts again."""
        step = self.last_step()
        return "starts the run again" if step is None else f"resumes the run from the checkpoint after step {step}"

    def snapshot_file(self, fraction: float) -> Path:
        """The checkpoint that `trainer.snapshots` keeps after a fraction of the epochs."""
        return self.checkpoints / f"snapshot-{fraction:g}.pt"

    def snapshot_files(self) -> list[Path]:
        """The checkpoints that `trainer.snapshots` has kept so far, by their fraction of the epochs."""
        return sorted(self.checkpoints.glob("snapshot-*.pt"), key=lambda path: float(path.stem.partition("-")[2]))

    def class_ratios_file(self, evaluation_id: str, step: int) -> Path:
        """The ratios by class on one validation set, up to the checkpoint after a step."""
        return self.path / f"class_ratios-{evaluation_id}-{step}.csv"

    def create(self, config_yaml: str) -> None:
        """Make the folder and write its `config.yaml`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.config_file, config_yaml)

    def read_config(self) -> dict[str, Any]:
        """Return the resolved configuration; raise ValueError if the folder is none of a run, or the file damaged."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        if not self.config_file.is_file():
            raise UserError(f"{self.path} is no run folder: it has no config.yaml; exnorm runs lists the run folders")
        try:
            values: Any = OmegaConf.to_container(OmegaConf.load(self.config_file), resolve=True)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
            values = None
        if lacking := lacking_in(values):
            raise UserError(f"{self.config_file} is damaged, it has no {lacking}: remove the folder and train again")
        return {str(key): value for key, value in values.items()}

    def read_record(self) -> dict[str, Any] | None:
        """Return the final numbers, or None while the run has not finished."""
        return read_json(self.record_file)

    def diverged_at(self) -> int | None:
        """The step at which the last attempt met a loss that is not finite; None if it did not end so."""
        try:
            found = re.match(rf"{NOT_FINITE} (\d+)", self.error_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return int(found[1]) if found else None

    def lock(self) -> "RunLock":
        """Take the folder for this process until `release` or the end of a `with`; raise RunLocked if it is taken."""
        return RunLock(self.lock_file)

    def is_locked(self) -> bool:
        """Whether a process holds the lock now."""
        try:
            handle = os.open(self.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False


class RunLock:
    """An exclusive lock on `.lock`, held from construction to `release`; the kernel frees it when the process dies."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(LOCK_TRIES):
            try:
                flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S)
        else:
            os.close(self._handle)
            raise RunLocked(f"{path.parent} is in use by {holder(path)}; wait for it, stop it, or choose another seed")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "started": utc_now()}
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(who).encode(), 0)
        self._held = True
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def release(self) -> None:
        """Give the folder back; a second call is an error of the caller."""
        self._held = False
        os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def _leave_to_parent(self) -> None:
        # A loader process would keep the lock for as long as it outlives a killed trainer.
        if self._held:
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def flock(handle: int, operation: int) -> None:
    """Lock an open file as `fcntl.flock` does; on a network file system without locks warn once, and go on."""
    try:
        fcntl.flock(handle, operation)
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        _warn_without_locks()


@functools.cache
def _warn_without_locks() -> None:
    line = "this file system has no locks (flock): do not start the same run or study twice at a time"
    print(f"exnorm: warning: {line}", file=sys.stderr, flush=True)


def lacking_in(config: Any) -> str:
    """The first thing that every run's configuration has and that this one has not; empty if nothing lacks."""
    if not isinstance(config, dict):
        return "mapping of settings"
    for key, kind in CONFIG_KEYS.items():
        if not isinstance(config.get(key), kind):
            return key
    return next((f"{key}.name" for key in NAMED if not isinstance(config[key].get("name"), str)), "")


def holder(lock_file: Path) -> str:
    """Say who holds a lock: process, machine and since when."""
    who = read_json(lock_file)
    if who is None:
        return "another process"
    return f"process {who.get('pid')} on {who.get('host')} since {who.get('started')}"


def utc_now() -> str:
    """Return the time as `2026-01-31T12:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def check_out(path: Path, *suffixes: str) -> None:
    """Refuse a file that could not be written, before the work for it begins.

    Raises:
        ValueError: its folder is not there, it is a folder itself, or its name ends otherwise.
    """
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise UserError(f"{path}: write the name of a file that ends with {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, also after a power cut."""
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write text to a neighbour, sync it, rename it into place and sync the folder.

    Names of files that are no UTF-8 are written as the bytes that they are.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with names_file(path), removes_on_failure(part):
        with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        rename_synced(part, path)


@contextmanager
def removes_on_failure(part: Path) -> Iterator[None]:
    """A half-written file does not stay behind: on a full disk it would take the room that the next attempt needs."""
    try:
        yield
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """An error of the system within says which file it is about."""
    try:
        yield
    except OSError as problem:
        problem.filename = str(path)
        raise


def rename_synced(part: Path, path: Path) -> None:
    """Rename a written and synced file into place and sync the folder, where the file system can do that."""
    os.replace(part, path)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)
