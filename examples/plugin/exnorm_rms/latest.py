"""A logger that keeps the latest row of metrics as a JSON file in the run folder, for a program that displays it."""

import json
from collections.abc import Sequence
from typing import Any

from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.metrics import plain


class LatestRow:
    """A sink of exnorm, see `exnorm.runs.sinks.Sink`.

    Args:
        file: the name of the JSON file.
    """

    def __init__(self, folder: RunFolder, run_config: dict[str, Any], *, file: str = "latest.json") -> None:
        self.path = folder.path / file

    def log(self, row: dict[str, Any], step: int) -> None:
        """Replace the file."""
        write_text_atomic(self.path, json.dumps(plain({"step": step, **row})))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Do nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Do nothing."""
