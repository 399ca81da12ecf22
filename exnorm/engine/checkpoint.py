"""Checkpoints: written whole or not at all, read back only if they are whole.

`checkpoints/step-<n>.pt` holds plain dicts and tensors (`weights_only=True` reads them); the last two are kept,
`best.pt` is the one with the best top-1, `snapshot-<fraction>.pt` are those that `trainer.snapshots` asks for. A file
goes to a neighbour, is synced and renamed; before use every record of it is checked against its CRC-32.
"""

import os
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
from exnorm.engine.weight_files import read_file
from exnorm.models import build_model
from exnorm.runs.folder import RunFolder, rename_synced

KEPT = 2
BEST = "best.pt"


def save(folder: RunFolder, state: dict[str, Any]) -> Path:
    """Write the state at `state["step"]` and drop all but the last two checkpoints; return the file."""
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    path = step_file(folder, state["step"])
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    rename_synced(part, path)
    for old in _by_step(folder)[:-KEPT]:
        old.unlink()
    for leftover in folder.checkpoints.glob("*.part"):
        leftover.unlink()
    return path


def step_file(folder: RunFolder, step: int) -> Path:
    """The file of the checkpoint after a step."""
    return folder.checkpoints / f"step-{step:09d}.pt"


def keep(path: Path, kept: Path) -> None:
    """Give a checkpoint a second name under which it stays, without a second copy of it."""
    part = kept.with_suffix(f".{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        part.write_bytes(path.read_bytes())
    rename_synced(part, kept)


def load_latest(folder: RunFolder) -> dict[str, Any] | None:
    """The state of the last whole checkpoint, or None; damaged ones are named on stderr and passed over."""
    paths = _by_step(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except UserError as problem:
            then = "the one before it is used" if path != paths[0] else "no other is left: training starts over"
            print(f"exnorm: warning: {problem}; {then}", file=sys.stderr, flush=True)
    return None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # noqa: BLE001 - whatever a damaged file makes the readers raise
        raise UserError(f"checkpoint {path} is damaged ({first_line(problem)})") from None


def find(folder: RunFolder, checkpoint: str) -> dict[str, Any]:
    """The state of `last`, `best`, or a file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if checkpoint == "last":
        state = load_latest(folder)
        if state is None:
            raise UserError(f"{folder.path} has no usable checkpoint yet; train first")
        return state
    return read(folder.checkpoints / BEST if checkpoint == "best" else Path(checkpoint))


def load(run_dir: str | Path, *, checkpoint: str = "last") -> nn.Module:
    """The trained model of a run, on the CPU in evaluation mode.

    Args:
        run_dir: the run folder.
        checkpoint: last, best, or a file.

    Raises:
        UserError: no run folder, or no usable checkpoint.
    """
    folder = RunFolder(run_dir)
    return build_trained(read_config(folder), find(folder, checkpoint)).eval()


def read_config(folder: RunFolder) -> Any:
    """A run's config with the defaults of keys that are younger than it."""
    schema = OmegaConf.structured(TrainConfig)
    return OmegaConf.merge(schema, OmegaConf.create(folder.read_config()))


def build_trained(config: Any, state: Mapping[str, Any]) -> nn.Module:
    """The model of a config with a checkpoint's weights, and its calibrated statistics where the run used them."""
    config = OmegaConf.merge(config, {"model": {"pretrained": False}})
    model = build_model(config.model, config.norm, num_classes=len(state["classes"]))
    try:
        model.load_state_dict({**state["model"], **(state.get("calibrated") or {})})
    except RuntimeError as problem:
        raise UserError(f"the checkpoint is one of another model: {' '.join(str(problem).split())[:200]}") from None
    return model


def read_weights(source: str | Path) -> dict[str, Any]:
    """The weights of a run folder, or what a file of weights holds (`exnorm.engine.weight_files`).

    Raises:
        UserError: no usable checkpoint, or a file without weights.
    """
    path = Path(source).expanduser()
    return find(RunFolder(path), "last")["model"] if path.is_dir() else read_file(path)


def _by_step(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("step-*.pt"))
