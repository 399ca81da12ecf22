"""The folder of a run: its files, the lock on it, and the list of all runs.

config.yaml  provenance.json  metrics.jsonl (the original)  record.json (final numbers, written last)
metrics.csv  wandb/  wandb-id.txt  checkpoints/  log.txt  error.txt (one line, while the last attempt failed)  .lock
noisy_labels.csv  bad_images.csv  evaluations.jsonl  class_ratios-*.csv  tensorboard/ (if there are any)
"""

import errno
import glob
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.runs.lock import FileLock, Locked, is_locked, is_running

NOT_FINITE = "the loss is not finite at step"  # the beginning of the error of a diverged training
NAMED = ("model", "norm", "data")
CONFIG_KEYS = {"trainer": dict, "batch": str, "seed": int, **dict.fromkeys(NAMED, dict)}  # keys that every run has
SHARED_S = 60  # NFS may show a new file of another node so late
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunLocked(UserError):
    """Another process is using the run folder; the message says which process and since when."""


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
        self.tensorboard_dir = self.path / "tensorboard"
        self.wandb_dir = self.path / "wandb"
        self.wandb_id_file = self.path / "wandb-id.txt"
        self.log_file = self.path / "log.txt"
        self.lock_file = self.path / ".lock"

    def last_step(self) -> int | None:
        """Return the step of the last checkpoint, or None."""
        names = [path.stem for path in self.checkpoints.glob("step-*.pt")]
        return max((int(name.removeprefix("step-")) for name in names), default=None)

    def continues(self) -> str:
        """Return what the same command does after a failure, such as "resumes the run from the checkpoint ..."."""
        if self.read_record() is not None:
            return "prints the result of the run, which had finished"
        step = self.last_step()
        return "starts the run again" if step is None else f"resumes the run from the checkpoint after step {step}"

    def snapshot_file(self, fraction: float) -> Path:
        """Return the checkpoint file that `trainer.snapshots` keeps after a fraction of the epochs."""
        return self.checkpoints / f"snapshot-{fraction:g}.pt"

    def snapshot_files(self) -> list[Path]:
        """Return the checkpoint files that `trainer.snapshots` has kept so far, sorted by fraction."""
        return sorted(self.checkpoints.glob("snapshot-*.pt"), key=lambda path: float(path.stem.partition("-")[2]))

    def class_ratios_file(self, evaluation_id: str, step: int) -> Path:
        """Return the file of the ratios by class on one validation set, up to the checkpoint after a step."""
        return self.path / f"class_ratios-{evaluation_id}-{step}.csv"

    def class_ratios_files(self) -> list[tuple[Path, str]]:
        """Return the files of ratios by class with the id of their evaluation; those of the usual classes are first."""
        found = [(path, path.stem.split("-")) for path in self.path.glob("class_ratios-*-*.csv")]
        return [(path, words[1]) for path, words in sorted(found, key=lambda item: (len(item[1]), item[1]))]

    def label_ratios_file(self, step: int) -> Path:
        """Return the file that says what the ratios at the checkpoint after a step tell of wrong labels."""
        return self.path / f"label_ratios-{step}.csv"

    def create(self, config_yaml: str) -> None:
        """Make the folder and write its `config.yaml`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.config_file, config_yaml)

    def read_config(self) -> dict[str, Any]:
        """Return the resolved configuration; raise UserError if this is not a run folder, or if the file is damaged."""
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from exnorm.runs.stored_config import read_stored

        again = f"Type the command in {self.provenance_file} again, without fresh=true: it writes the file anew"
        if not self.config_file.is_file() and self.provenance_file.is_file():
            raise UserError(f"{self.path} has lost its config.yaml. {again}")
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml. Type exnorm runs to list runs")
        try:
            values: Any = read_stored(self.config_file.read_text(encoding="utf-8"))
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
            values = None
        if lacking := lacking_in(values):
            raise UserError(f"{self.config_file} is damaged: it has no {lacking}. {again}")
        return {str(key): value for key, value in values.items()}

    def read_record(self) -> dict[str, Any] | None:
        """Return the final numbers, or None while the run has not finished."""
        return read_json(self.record_file)

    def is_complete(self) -> bool:
        """Return whether the run has finished and has its configuration, which evaluations and records need."""
        return self.config_file.is_file() and self.read_record() is not None

    def diverged_at(self) -> int | None:
        """Return the step at which the loss of the last attempt was not finite; None if it ended otherwise."""
        try:
            found = re.match(rf"{NOT_FINITE} (\d+)", self.error_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return int(found[1]) if found else None

    def lock(self) -> FileLock:
        """Lock the folder until `release` or the end of a `with`; raise RunLocked if another process has the lock."""
        try:
            return FileLock(self.lock_file)
        except Locked as problem:
            raise RunLocked(
                f"{self.path} is in use by {problem}. Wait for it, stop it, or choose another seed"
            ) from None

    def is_locked(self) -> bool:
        """Return whether a process holds the lock now."""
        return is_locked(self.lock_file)


def lacking_in(config: Any) -> str:
    """Return the first key that a run's configuration needs and this one lacks; empty if it is complete."""
    if not isinstance(config, dict):
        return "mapping of settings"
    for key, kind in CONFIG_KEYS.items():
        if not isinstance(config.get(key), kind):
            return key
    return next((f"{key}.name" for key in NAMED if not isinstance(config[key].get("name"), str)), "")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def check_out(path: Path, *suffixes: str) -> None:
    """Check that an output file can be written, before the work for it begins.

    Raises:
        UserError: its folder does not exist, it is a folder itself, or its name has another suffix.
    """
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise UserError(f"{path}: give the name of a file that ends with {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


def wait_for_shared(path: Path) -> bool:
    """Wait until a file is seen that another node has written, at most SHARED_S. Return whether it is there."""
    end = time.monotonic() + SHARED_S
    while not path.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, also after a power cut."""
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write text to a temporary file in the same folder, sync it, rename it to `path` and sync the folder.

    File names that are not valid UTF-8 are written as their original bytes. Temporary files of processes of this
    machine that were killed while they wrote the same file are removed.
    """
    here = f".{path.name}.{socket.gethostname()}"
    for leftover in path.parent.glob(f"{glob.escape(here)}.*.part"):
        if not is_running(leftover.name.split(".")[-2]):
            with suppress(OSError):  # it may be another user's
                leftover.unlink()
    part = path.with_name(f"{here}.{os.getpid()}.part")
    with names_file(path), removes_on_failure(part):
        with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        rename_synced(part, path)


@contextmanager
def removes_on_failure(part: Path) -> Iterator[None]:
    """Remove an incomplete file after a failure: on a full disk it would take the space that the next attempt needs."""
    try:
        yield
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Add the name of the file to a system error that is raised inside the block."""
    try:
        yield
    except OSError as problem:
        problem.filename = str(path)
        raise


def rename_synced(part: Path, path: Path) -> None:
    """Rename a written and synced file to `path`, and sync the folder if the file system supports it."""
    os.replace(part, path)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)
