"""What must hold after a fault: one line where the command failed, and in the end the same run as without the fault.

Each function raises `FellShort` with what it found.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from exnorm.runs.lock import holder, is_locked
from faults import processes
from faults.cases import Case, End, FellShort

TIMES = {"images_per_s", "time", "train_s", "hours", "commit", "uncommitted", "data.root", "device", "seconds"}
OURS = ("exnorm: ", "failed: ")
MAY_APPEAR = ("wandb", "uncommitted", "bad_images.csv", ".damaged", "tables/", "metrics.csv")
STEP_FILE = re.compile(r"checkpoints/step-\d+\.pt")
STOPPED = {-2, -15, 130, 143}  # the end by a signal, before Python can answer it and after


def one_line(end: End) -> str:
    """Return the last line of a command that failed; it must be exnorm's own, and the only one."""
    if "Traceback" in end.err:
        raise FellShort(f"a traceback with code {end.code}: {end.lines[-1] if end.lines else ''}")
    strange = [line for line in end.lines if not line.startswith(OURS)]
    if strange:
        raise FellShort(f"{len(strange)} lines are not exnorm's, such as: {strange[-1]}")
    if not end.lines:
        raise FellShort(f"ended with code {end.code} and without a line")
    return end.lines[-1]


def nothing_left(case: Case) -> None:
    """Check that no process of the case is left."""
    left = processes.left_behind(case.mark)
    if left:
        raise FellShort(f"processes are left behind: {', '.join(f'{role} {pid}' for pid, role in left.items())}")


def steps_of(run: Path) -> list[int]:
    """Return the steps of the checkpoints of a run."""
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt"))


class Before:
    """What the runs of a case had before the command was started again."""

    def __init__(self, case: Case, *, damaged: Iterable[Path] = ()) -> None:
        """Note the state; `damaged` are the checkpoints that no run can continue from."""
        bad = {(path.parents[1], int(path.stem[5:])) for path in damaged}
        self.steps = {run: [step for step in steps_of(run) if (run, step) not in bad] for run in case.runs()}
        self.finished = {run for run in case.runs() if (run / "record.json").is_file()}
        self.log_bytes = {run: _size(run / "log.txt") for run in case.runs()}

    def check_resumed(self) -> None:
        """Check that no run with a checkpoint has started over."""
        for run, steps in self.steps.items():
            log = (run / "log.txt").read_bytes() if (run / "log.txt").is_file() else b""
            new = log[self.log_bytes[run] :].decode(errors="replace")
            wanted = f"resumed after step {steps[-1]}" if steps else ""
            if steps and new and run not in self.finished and wanted not in new:
                raise FellShort(f"{run.name} had a checkpoint after step {steps[-1]} and did not resume from it")


def same_as_reference(case: Case) -> None:
    """Check that the command left what it leaves without a fault: weights, optimizer, metrics, records, files."""
    assert case.reference is not None
    wanted = Case(case.reference, case.command, case.processes, case.draw)
    names = [[str(run.relative_to(one.here)) for run in one.runs()] for one in (case, wanted)]
    if names[0] != names[1]:
        raise FellShort(f"the runs are {names[0]} and should be {names[1]}")
    for left, right in zip(case.runs(), wanted.runs(), strict=True):
        same_run(left, right)
    for file in sorted(wanted.here.glob("results/records/*.csv")):
        other = case.here / file.relative_to(wanted.here)
        if not other.is_file():
            raise FellShort(f"{other.name} is missing")
        _same_rows(_rows_of_csv(other), _rows_of_csv(file), other.name)


def same_run(left: Path, right: Path) -> None:
    """Check that a run folder has what the reference has."""
    _same_files(left, right)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        if (right / name).is_file():
            _same_rows(_rows(left / name), _rows(right / name), f"{left.name}/{name}")
    record = [json.loads((run / "record.json").read_text()) for run in (left, right)]
    _same_rows([_without_times(record[0])], [_without_times(record[1])], f"{left.name}/record.json")
    if steps_of(left)[-1:] != steps_of(right)[-1:]:
        raise FellShort(
            f"{left.name} ends after step {steps_of(left)[-1:]} and should end after {steps_of(right)[-1:]}"
        )
    last = f"step-{steps_of(right)[-1]:09d}.pt"
    for name in (last, "best.pt"):
        states = [
            torch.load(run / "checkpoints" / name, map_location="cpu", weights_only=True) for run in (left, right)
        ]
        same_state(*states, f"{left.name}/{name}")


def once(file: Path) -> None:
    """Keep one of two equal rows: a command that ran twice evaluates twice, each time with a row of its own."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = _rows(file)
    if len(rows) == 2 and rows[0] == rows[1]:
        file.write_text(lines[0], encoding="utf-8")


def drop_other_data(case: Case) -> bool:
    """Drop the evaluations of changed data, which have ids of their own. Return whether there were any."""
    assert case.reference is not None
    any_dropped = False
    for file in case.here.glob("runs/*/*/evaluations.jsonl"):
        known = {row["id"] for row in _rows(case.reference / "here" / file.relative_to(case.here))}
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["id"] in known]
        if kept != lines:
            file.write_text("".join(kept), encoding="utf-8")
            any_dropped = True
    return any_dropped


def same_state(left: Any, right: Any, where: str) -> None:
    """Check that two nested states are equal to the last bit, but for times."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        equal = left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, Mapping) and isinstance(right, Mapping):
        if left.keys() != right.keys():
            raise FellShort(f"{where} has other keys")
        for key in left:
            if key not in TIMES:
                same_state(left[key], right[key], f"{where}/{key}")
        return
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            same_state(a, b, f"{where}/{index}")
        return
    else:
        equal = left == right
    if not equal:
        raise FellShort(f"{where} differs")


def _same_files(left: Path, right: Path) -> None:
    has, wanted = _files(left), _files(right)
    lost = {name for name in wanted - has if not STEP_FILE.fullmatch(name)}
    if lost:
        raise FellShort(f"{left.name} lacks {', '.join(sorted(lost))}")
    new = {name for name in has - wanted if not STEP_FILE.fullmatch(name)}
    more = {name for name in new if not any(part in name for part in MAY_APPEAR)}
    if more:
        raise FellShort(f"{left.name} has more files: {', '.join(sorted(more))}")
    if is_locked(left / ".lock"):
        raise FellShort(f"{left.name} is still held by {holder(left / '.lock')}")


def _same_rows(left: list[Mapping[str, Any]], right: list[Mapping[str, Any]], where: str) -> None:
    if len(left) != len(right):
        raise FellShort(f"{where} has {len(left)} rows and should have {len(right)}")
    for number, (a, b) in enumerate(zip(left, right, strict=True), start=1):
        if a != b:
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            raise FellShort(f"{where}, row {number} differs in {', '.join(keys[:3])}")


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise FellShort(f"{path.parent.name} lacks {path.name}")
    try:
        return [_without_times(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise FellShort(f"{path.parent.name}/{path.name} has a damaged line") from None


def _rows_of_csv(path: Path) -> list[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [_without_times(row) for row in csv.DictReader(stream)]
    return [row for row in rows if row.get("metric") not in TIMES]


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
