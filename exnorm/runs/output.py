"""Printing where the terminal's encoding lacks characters: under PYTHONIOENCODING=ascii, or in an old locale."""

import codecs
import sys
import unicodedata

NAME = "exnorm"
IN_ASCII = {"±": "+-", "×": "x", "–": "-", "—": "-", "…": "...", "·": "."}


def print_anything() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is written in the nearest plain letters."""
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
