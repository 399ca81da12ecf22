"""One-line error messages for users, and suggestions for misspelled words."""

import difflib
from collections.abc import Iterable

SHOWN = 16  # so many words are listed, the others are counted
BUG = (
    "exnorm: this is a bug, in exnorm or in code of yours that it runs. To report it, send the lines above "
    "and what `exnorm doctor` prints."
)


class UserError(ValueError):
    """A mistake of the user: what was wrong, what is allowed and what to type, in one line."""


def nearest(word: str, allowed: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to `count` of the allowed words that look like `word`, the nearest first."""
    return difflib.get_close_matches(word, list(allowed), n=count, cutoff=cutoff)


def suggest(word: str, allowed: Iterable[str], *, count: int = 1) -> str:
    """Return "did you mean 'x'?" for the nearest of `allowed`, or else "allowed: a, b, ..."."""
    words = list(allowed)
    near = nearest(word, words, count=count)
    if near:
        return "did you mean " + " or ".join(f"'{other}'" for other in near) + "?"
    return f"allowed: {shorten(words)}"


def shorten(words: Iterable[str]) -> str:
    """Join words with commas, and count those beyond the first `SHOWN`."""
    listed = list(words)
    rest = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f", ... ({rest} more)" if rest > 0 else "")


def first_line(exc: BaseException) -> str:
    """Shorten a message to its first line, with the key that OmegaConf names further down."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]
    key = getattr(exc, "full_key", None)
    return f"{key}: {lines[0]}" if key else lines[0]
