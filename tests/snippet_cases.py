"""The code of README.md and of docs/: blocks of Python and of the shell, and single words of code in the text.

Of a notebook, only the words in its text: tests/test_notebooks.py runs its code.
"""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

from exnorm.config.words import without_submit

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ITEM = re.compile(r"([*-]|\d+\.) ")
COMMAND = re.compile(r"(\w+=\S+ )*(exnorm|make|pip|python|git|source|mkdocs|torchrun|srun)\b")


class Block(NamedTuple):
    """A block of code: `place` is its page and line, `language` the word behind its fence."""

    place: str
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        """Whether the block is made of commands."""
        return not self.language and COMMAND.match(self.text) is not None


class Line(NamedTuple):
    """A command: the variables that are set before it, its name, and its words."""

    place: str
    variables: dict[str, str]
    name: str
    words: list[str]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page: fenced with backticks, or indented by four spaces outside of lists."""
    found: list[Block] = []
    lines: list[str] = []
    in_list = False
    fence: str | None = None  # the indentation of the fence, inside one
    language = ""

    def end_block(number: int) -> None:
        if text := "\n".join(lines).strip("\n"):
            place = f"{page.relative_to(ROOT).as_posix()}:{number - len(lines)}"
            found.append(Block(place, language, text))
        lines.clear()

    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), "", "the end"], 1):
        if line.lstrip().startswith("```"):
            end_block(number)
            language = line.strip("` ") if fence is None else ""
            fence = line[: len(line) - len(line.lstrip())] if fence is None else None
        elif fence is not None:
            lines.append(line.removeprefix(fence))
        elif line.startswith("    ") and (lines or not in_list):
            lines.append(line[4:])
        elif not line.strip() and lines:
            lines.append("")
        else:
            end_block(number)
            in_list = ITEM.match(line) is not None or (in_list and (not line.strip() or line.startswith("  ")))
    return found


def shell_lines(block: Block) -> list[Line]:
    """Return the commands of a block, without comments; a backslash continues a line."""
    commands = block.text.replace("\\\n", " ").splitlines()
    return [parsed(block.place, text) for text in commands if shlex.split(text, comments=True)]


def parsed(place: str, text: str) -> Line:
    """Return a command as a shell reads it."""
    words = shlex.split(text, comments=True)
    count = len(list(itertools.takewhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words)))
    variables = dict(word.split("=", 1) for word in words[:count])
    return Line(place, variables, words[count], words[count + 1 :])


def code_words() -> list[tuple[str, str]]:
    """Return (page, text) for everything between single backticks in the text of the pages."""
    found = []
    for page in [*PAGES, *NOTEBOOKS]:
        text = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
        found += [(page.relative_to(ROOT).as_posix(), code) for code in re.findall(r"`([^`\n]+)`", prose)]
    return found


def text_of(page: Path) -> str:
    """Return the text of a page. For a notebook, that is the text between its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def single_runs(words: list[str]) -> list[list[str]]:
    """Return the settings of each run of a training command; with -m, those of every combination."""
    settings = [word for word in without_submit(words)[0] if word != "-m"]
    if "-m" not in words:
        return [settings]
    choices = [[f"{key}={value}" for value in text.split(",")] for key, _, text in (s.partition("=") for s in settings)]
    return [list(run) for run in itertools.product(*choices)]
