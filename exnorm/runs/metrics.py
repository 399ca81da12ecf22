"""`metrics.jsonl`: one JSON object per line, with "step" first. All other sinks copy this file."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.runs.folder import names_file, write_text_atomic

MEND = "Put a good copy of the file there, or remove that line"


class MetricsLog:
    """Appends rows to a file. A line that was cut short by a kill is dropped when the file is opened again."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_file():
            drop_torn_line(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Append one row; it needs "step" (optimizer steps done). NaN and infinity become null."""
        if "step" not in row:
            raise ValueError(f"a row of metrics needs the key 'step', got {sorted(row)}: add step=...")
        append_text(self.path, to_line({"step": row["step"], **row}), synced=True)

    def check_complete(self, epochs: int) -> None:
        """Check that no row is missing of the epochs that a checkpoint has validated.

        Raises:
            UserError: a row is missing, so the record of the run would be incomplete.
        """
        rows = self.read(self.path)
        known = {row["epoch"] for row in validated(rows)}
        if lacks := [epoch for epoch in range(1, epochs + 1) if epoch not in known]:
            step = max((row["step"] for row in rows if row.get("epoch", 0) <= lacks[0]), default=0)
            empty = json.dumps({"step": step, "epoch": lacks[0], "val/loss": None})
            raise UserError(
                f"{self.path} has lost the row of epoch {lacks[0]}, which the last checkpoint has validated. Put a "
                f"good copy of the file there. To continue without these numbers, add the line {empty}"
            )

    def cut_back(self, step: int, epochs: int) -> None:
        """Keep only the rows from before a checkpoint after `step` steps and `epochs` validated epochs."""
        rows = [row for row in self.read(self.path) if is_known(row, step, epochs)]
        write_text_atomic(self.path, "".join(to_line(row) for row in rows))

    @staticmethod
    def read(path: Path | str) -> list[dict[str, Any]]:
        """Return all rows but an incomplete last one; none if the file is missing. Raise UserError for other damage."""
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise UserError(f"{path}, line {number} is damaged ({problem}). {MEND}") from None
            if not is_row(row):
                raise UserError(f"{path}, line {number} is damaged (no metrics after a step). {MEND}")
            rows.append(row)
        return rows


def is_row(row: Any) -> bool:
    """Return whether a value has the form of a row: step and epoch are integers, metrics (with a /) are numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not isinstance(row.get("epoch", 0), int):
        return False
    return all(value is None or isinstance(value, int | float) for key, value in row.items() if "/" in key)


def is_known(row: Mapping[str, Any], step: int, epochs: int) -> bool:
    """Return whether a row is from before a checkpoint, which may be between an epoch's last step and validation."""
    return int(row["step"]) <= step and not (is_validation(row) and int(row["epoch"]) > epochs)


def is_validation(row: Mapping[str, Any]) -> bool:
    """Return whether a row is that of a validation, at the end of an epoch."""
    return any(key.startswith("val/") for key in row)


def validated(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of validations."""
    return [row for row in rows if is_validation(row)]


def to_line(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON."""
    return json.dumps({key: plain(value) for key, value in row.items()}, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: other numbers become floats, NaN and infinity become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None


def append_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Append in one write, so that lines of several processes do not mix. File names need not be valid UTF-8.

    Args:
        synced: the text is on the disk when this returns, so a power cut takes no row that a later checkpoint knows of.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    data = text.encode(errors="surrogateescape")
    try:
        with names_file(path):
            while data:  # a full disk takes only a part; the next write raises the error
                data = data[os.write(handle, data) :]
            if synced:
                os.fsync(handle)
    finally:
        os.close(handle)


def drop_torn_line(path: Path) -> None:
    """Cut a file after its last complete line."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
