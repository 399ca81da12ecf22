"""Print safely when standard output is closed or its encoding lacks characters. Imports no torch.

It is closed when a pipe's reader ends or a terminal is closed. Characters lack with PYTHONIOENCODING=ascii or an old
locale.
"""

import codecs
import io
import sys
import unicodedata
from typing import Any

NAME = "exnorm"
IN_ASCII = {"±": "+-", "×": "x", "–": "-", "—": "-", "…": "...", "·": "."}


class _Forgiving(io.FileIO):
    """A descriptor whose writes never fail: data that cannot be written is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive_output() -> None:
    """Continue when stdout or stderr is closed, as in `exnorm train | head -2`; `log.txt` has every line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # there is none, or a test reads it
            continue
        raw: Any = _Forgiving(stream.fileno(), "wb", closefd=False)
        options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
        at_once = stream.write_through  # PYTHONUNBUFFERED
        buffer = raw if at_once else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, write_through=at_once, **options))


def print_anything() -> None:
    """Let stdout and stderr print any text; characters that their encoding lacks become the nearest ASCII letters."""
    codecs.register_error(NAME, _plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=NAME)  # pyright: ignore[reportAttributeAccessIssue]


def _plain_letters(problem: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(problem, UnicodeEncodeError)
    text = problem.object[problem.start : problem.end]
    return "".join(_plain_letter(letter) for letter in text), problem.end


def _plain_letter(letter: str) -> str:
    if letter in IN_ASCII:
        return IN_ASCII[letter]
    simple = unicodedata.normalize("NFKD", letter)[0]
    return simple if simple.isascii() else "?"
