"""Checkpoints: written completely or not at all, and checked before they are read.

`checkpoints/step-<n>.pt` has plain dicts and tensors (`weights_only=True` reads them); the last two are kept. `best.pt`
is the one with the best primary metric, `snapshot-<fraction>.pt` are those that `trainer.snapshots` asks for. A
checkpoint is written to a temporary file, synced and renamed. Before use, each of its records is checked against its
CRC-32. A damaged one is renamed to `step-<n>.pt.damaged` when the run resumes.
"""

import errno
import io
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from exnorm.config.errors import UserError, first_line
from exnorm.config.schema import TrainConfig
from exnorm.engine.check_task import read_task
from exnorm.engine.description import read_exported
from exnorm.engine.distributed import World
from exnorm.engine.weight_files import SAFETENSORS, read_file
from exnorm.models import build_network
from exnorm.runs.folder import DISK_FULL, RunFolder, names_file, removes_on_failure, rename_synced, wait_for_shared
from exnorm.tasks import make_task

KEPT = 2
OF_A_RUN = {"model", "classes", "step"}  # what every checkpoint has
BEST = "best.pt"
STEP_FILE = re.compile(r"step-\d+\.pt")
DAMAGED = ".damaged"
NO_ARCHIVE = "failed reading zip archive"  # torch's error for a damaged header; a test flips bits in all headers


class Damaged(UserError):
    """The bytes of a checkpoint differ from those that were written."""


def save(folder: RunFolder, state: dict[str, Any]) -> Path:
    """Write the state at `state["step"]` and drop all but the last two checkpoints; return the file.

    Raises:
        UserError: the disk is full; no incomplete file stays.
    """
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    path = step_file(folder, state["step"])
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with removes_on_failure(part):
            with open(part, "wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            rename_synced(part, path)
    except (OSError, RuntimeError) as problem:
        cause = problem.__context__ if isinstance(problem, RuntimeError) else problem  # torch's own, about its archive
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise UserError(_no_room(folder, state)) from None
        raise
    others = [other for other in _by_step(folder) if other != path]
    for old in others[: len(others) - KEPT + 1]:
        old.unlink()
    for leftover in folder.checkpoints.glob("*.part"):
        leftover.unlink()
    return path


class _Counter(io.BytesIO):
    """A file that only counts the bytes written to it."""

    count = 0

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size


def _no_room(folder: RunFolder, state: Mapping[str, Any]) -> str:
    counter = _Counter()
    torch.save(state, counter)
    free = shutil.disk_usage(folder.checkpoints).free
    return (
        f"the disk is full: a checkpoint in {folder.checkpoints} needs {counter.count} bytes and {free} are free. Free "
        f"some space; then the same command {folder.continues()}"
    )


def step_file(folder: RunFolder, step: int) -> Path:
    """Return the file of the checkpoint after a step."""
    return folder.checkpoints / f"step-{step:09d}.pt"


def keep(path: Path, kept: Path) -> None:
    """Give a checkpoint a second, permanent name, by a hard link where the file system has them."""
    if kept.is_file() and kept.samefile(path):  # renaming one name of a file to another one of it would leave both
        return
    part = kept.with_suffix(f".{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with names_file(kept), removes_on_failure(part):
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            part.write_bytes(path.read_bytes())
        rename_synced(part, kept)


def load_latest(folder: RunFolder) -> dict[str, Any] | None:
    """Return the state of the last complete checkpoint, or None; damaged ones are reported on stderr and skipped.

    Raises:
        UserError: a checkpoint is not damaged but still cannot be read.
    """
    paths = _by_step(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except Damaged as problem:
            then = "the one before it is used" if path != paths[0] else "there is no other"
            print(f"exnorm: warning: {problem}; {then}", file=sys.stderr, flush=True)
    return None


def resume(folder: RunFolder, world: World) -> dict[str, Any] | None:
    """Return the state from which a run continues, the same on all workers; None for a new run.

    Raises:
        UserError: there are checkpoints but none can be read. A run starts over only if the user asks for it.
    """
    state = _set_damaged_aside(folder) if world.is_first else None
    (step,) = world.largest(-1 if state is None else state["step"])
    if world.is_first or step < 0:
        return state
    path = step_file(folder, step)
    wait_for_shared(path)
    return read(path)


def _set_damaged_aside(folder: RunFolder) -> dict[str, Any] | None:
    """Rename damaged checkpoints, the last one first, until one is complete; return its state."""
    for path in reversed(_by_step(folder)):
        try:
            return read(path)
        except Damaged as problem:
            path.replace(path.with_name(path.name + DAMAGED))
            print(f"exnorm: warning: {problem}; it was renamed to {path.name}{DAMAGED}", file=sys.stderr, flush=True)
    damaged = sorted(path.name for path in folder.checkpoints.glob(f"step-*{DAMAGED}"))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} can be read: {', '.join(damaged)}. Put a good copy of one there, "
            "under its name without .damaged, or type fresh=true to start over"
        )
    return None


def read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        Damaged: its bytes differ from those that were written.
        UserError: it is missing, or cannot be read for another, perhaps temporary, reason.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # noqa: BLE001 - another version of torch, a refused pickle, a disk
        if NO_ARCHIVE in str(problem):  # torch's reader checks parts of the headers that zipfile ignores
            raise Damaged(f"checkpoint {path} is damaged (its headers are inconsistent)") from None
        raise UserError(
            f"checkpoint {path} is not damaged, but torch {torch.__version__} cannot read it ({first_line(problem)}). "
            "Use the version of torch in the run's provenance.json, or try again"
        ) from None


def _check_archive(path: Path) -> None:
    """Compare every record of a checkpoint with its checksum.

    Raises:
        Damaged: a record differs, or the file is not a complete archive.
        UserError: the file cannot be read now.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except MemoryError:
        raise
    except Exception as problem:  # noqa: BLE001 - zipfile raises errors of many kinds for a damaged header
        if isinstance(problem, OSError) and problem.errno != errno.EINVAL:  # a damaged offset gives EINVAL
            raise UserError(f"checkpoint {path} cannot be read now ({first_line(problem)}). Try again") from None
        raise Damaged(f"checkpoint {path} is damaged ({first_line(problem)})") from None
    if broken is not None:
        raise Damaged(f"checkpoint {path} is damaged ({broken} does not match its checksum)")


def find(folder: RunFolder, checkpoint: str) -> dict[str, Any]:
    """Return the state in the checkpoint `last`, `best`, or a file.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if checkpoint == "last":
        state = load_latest(folder)
        if state is None:
            raise UserError(f"{folder.path} has no checkpoint that can be read. Train first")
        return state
    state = read(folder.checkpoints / BEST if checkpoint == "best" else Path(checkpoint))
    if not state.keys() >= OF_A_RUN:
        raise UserError(f"{checkpoint} is not a checkpoint of a run. Give last, best or a file of its checkpoints")
    return state


def load(run_dir: str | Path, *, checkpoint: str = "last") -> nn.Module:
    """Return the trained model of a run, on the CPU in evaluation mode.

    Args:
        run_dir: the run folder, or a safetensors file that `exnorm export` wrote.
        checkpoint: of a run folder: last, best, or a file.

    Raises:
        UserError: this is not a run folder or such a file, or there is no usable checkpoint.
    """
    path = Path(run_dir)
    if path.suffix.lower() == SAFETENSORS and path.is_file():
        return build_trained(*read_exported(path)).eval()
    folder = RunFolder(path)
    return build_trained(read_config(folder), find(folder, checkpoint)).eval()


def read_config(folder: RunFolder) -> Any:
    """Return the config of a run, with defaults for keys that are newer than the run."""
    values = folder.read_config()
    config = OmegaConf.create({**values, "task": read_task(values)})
    return OmegaConf.merge(OmegaConf.structured(TrainConfig), config)


def build_trained(config: Any, state: Mapping[str, Any]) -> nn.Module:
    """Return the model of a config with a checkpoint's weights and, if the run used them, calibrated statistics."""
    config = OmegaConf.merge(config, {"model": {"pretrained": False}})
    task = make_task(config.task, state["classes"])
    model = build_network(task.network, config.model, config.norm)
    try:
        model.load_state_dict({**validated_weights(state), **(state.get("calibrated") or {})})
    except RuntimeError as problem:
        raise UserError(f"the checkpoint belongs to another model: {' '.join(str(problem).split())[:200]}") from None
    return model


def read_weights(source: str | Path) -> dict[str, Any]:
    """Return the weights of a run folder, or the content of a file of weights (`exnorm.engine.weight_files`).

    Raises:
        UserError: there is no usable checkpoint, or the file has no weights.
    """
    path = Path(source).expanduser()
    state = find(RunFolder(path), "last") if path.is_dir() else read_file(path)
    return validated_weights(state) if path.is_dir() or "ema" in state else state


def validated_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights in a checkpoint that were validated: their average, if the run has `trainer.ema`."""
    return state["ema"] if "ema" in state else state["model"]


def _by_step(folder: RunFolder) -> list[Path]:
    try:
        names = os.listdir(folder.checkpoints)  # glob() would treat an unreadable folder as empty
    except FileNotFoundError:
        return []
    return [folder.checkpoints / name for name in sorted(names) if STEP_FILE.fullmatch(name)]
