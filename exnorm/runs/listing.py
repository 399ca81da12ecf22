"""List all runs below a folder, with one summary each; damaged run folders are listed as unreadable."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from exnorm.config.errors import UserError, first_line
from exnorm.config.metrics import metrics_of
from exnorm.runs.folder import RunFolder, read_json
from exnorm.runs.metrics import MetricsLog

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, YAMLError, OmegaConfBaseException)
MARKS = frozenset({"config.yaml", "metrics.jsonl", "record.json", "provenance.json"})


@dataclass(frozen=True)
class RunSummary:
    """One line about a run; `state` is running, finished, failed, interrupted or unreadable.

    `reason` says why it failed or cannot be read.
    """

    path: Path
    state: str
    epoch: int | None = None  # the last epoch measured
    epochs: int | None = None  # as configured
    metric: str = ""  # the heading of the primary metric
    value: float | None = None  # of the primary metric; from the record, or else from the last measurement
    norm: str = ""
    model: str = ""
    batch: str = ""
    data: str = ""
    seed: int | None = None
    started: str = ""
    reason: str = ""


def list_runs(root: Path | str) -> list[RunSummary]:
    """Return the runs below a folder, sorted by path; raise UserError if there is no such folder."""
    if not Path(root).is_dir():
        raise UserError(f"there is no folder {root}. Type exnorm runs FOLDER, where FOLDER has your runs")
    found = []
    for folder, subfolders, files in os.walk(root):
        if MARKS.intersection(files):
            subfolders.clear()
            found.append(summary(RunFolder(folder)))
        else:
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(found, key=lambda run: run.path)


def summary(folder: RunFolder) -> RunSummary:
    """Return the summary of one run folder; any damage makes it `unreadable`."""
    try:
        config, rows = folder.read_config(), MetricsLog.read(folder.metrics_file)
        primary, current = metrics_of(config)[0], state(folder)
        value = measured(folder, rows, primary.key)
        return RunSummary(
            path=folder.path,
            state=current,
            epoch=last(rows, "epoch"),
            epochs=_epochs(config["trainer"]),
            metric=primary.heading,
            value=None if value is None else float(value),
            norm=config["norm"]["name"],
            model=config["model"]["name"],
            batch=config["batch"],
            data=config["data"]["name"],
            seed=config["seed"],
            started=str((read_json(folder.provenance_file) or {}).get("time", "")),
            reason=" ".join(folder.error_file.read_text(encoding="utf-8").split()) if current == "failed" else "",
        )
    except DAMAGE as problem:
        reason = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {first_line(problem)}"
        return RunSummary(path=folder.path, state="unreadable", reason=reason)


def state(folder: RunFolder) -> str:
    """Return the state of a readable run; it is running if its lock is held."""
    if folder.is_locked():
        return "running"
    if folder.read_record() is not None:
        return "finished"
    return "failed" if folder.error_file.is_file() else "interrupted"


def _epochs(trainer: Mapping[str, Any]) -> int | None:
    """Return how often a run validates, as configured; None if that depends on the size of its data."""
    steps, part = trainer.get("steps"), trainer.get("validate_every")
    if steps is None and part is None:
        return trainer["epochs"]
    return -(-steps // part) if steps is not None and part is not None else None


def measured(folder: RunFolder, rows: list[dict[str, Any]], key: str) -> float | None:
    """Return the final value of a metric, or the last one measured."""
    record = folder.read_record() or {}
    return record.get(key, last(rows, key))


def last(rows: list[dict[str, Any]], key: str) -> Any:
    """Return the last value of a metric, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
