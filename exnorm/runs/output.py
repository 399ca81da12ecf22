"""Standard output that may go away: a pipe whose reader ends, a terminal that is closed. Imports no torch."""

import io
import sys
from typing import Any


class _Forgiving(io.FileIO):
    """A descriptor whose writes never fail: what cannot be written is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive_output() -> None:
    """From now on a closed stdout or stderr ends nothing, as in `exnorm train | head -2`; `log.txt` has every line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # none at all, or one that a test reads
            continue
        raw = _Forgiving(stream.fileno(), "wb", closefd=False)
        options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **options))
