"""A table of texts, some of them bold, as Markdown, LaTeX and HTML."""

import html
from collections.abc import Sequence
from typing import NamedTuple

TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}


class Entry(NamedTuple):
    """The text of one entry of a table."""

    text: str
    bold: bool = False


class Grid(NamedTuple):
    """The headings of a table, and its rows, which have the same length."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Entry]]


def to_markdown(grid: Grid) -> str:
    """Return a table in GitHub's Markdown."""
    lines = [list(grid.heads), ["---"] * len(grid.heads)]
    lines += [[f"**{text}**" if bold else text for text, bold in row] for row in grid.rows]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in lines)


def to_tex(grid: Grid) -> str:
    """Return a `tabular` with the rules of the package booktabs."""
    body = [[rf"\textbf{{{_tex(text)}}}" if bold else _tex(text) for text, bold in row] for row in grid.rows]
    lines = [rf"{' & '.join(line)} \\" for line in ([_tex(head) for head in grid.heads], *body)]
    columns = "l" * len(grid.heads)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def to_html(grid: Grid) -> str:
    """Return a `<table>`."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.heads)
    rows = (
        "".join(f"<td{' class=best' if bold else ''}>{html.escape(text)}</td>" for text, bold in row)
        for row in grid.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)
