"""The section on faults in `results/README.md`, from `results/faults.csv`, which `scripts/fault_campaign.py` writes."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from exnorm.report.grids import Entry, Grid, to_markdown

FILE = "faults.csv"
OUTCOMES = ("bit_equal", "one_line", "fell_short")
COLUMNS = ("kind", "command", "processes", "injected", *OUTCOMES, "device", "python", "torch", "exnorm", "commit")
Row = Mapping[str, str]


def section(results: Path) -> str | None:
    """Return the section on faults; None if no campaign was recorded."""
    file = results / FILE
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    injected = sum(int(row["injected"]) for row in rows)
    short = sum(int(row["fell_short"]) for row in rows)
    about = (
        f"`scripts/fault_campaign.py` injected {injected} faults into tiny runs, on {_each(rows, 'device')}, with "
        f"torch {_each(rows, 'torch')}. {short} of them fell short of what "
        "[reproducibility](../docs/reproducibility.md) promises."
        + (" `CHANGELOG.md` says what was mended after them." if short else "")
    )
    return "\n\n".join(["## What a fault leaves behind", about, to_markdown(table(rows)), READING])


def table(rows: Sequence[Row]) -> Grid:
    """Return a row for each kind of fault, over all commands and numbers of processes."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    lines = [
        [
            Entry(kind),
            Entry(_each(found, "command")),
            Entry(_each(found, "processes")),
            *(Entry(str(sum(int(row[column]) for row in found))) for column in ("injected", *OUTCOMES)),
        ]
        for kind, found in by_kind.items()
    ]
    heads = ("fault", "commands", "processes", "injected", "bit-equal", "one line", "fell short")
    return Grid(heads, lines)


def _each(rows: Sequence[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(row[column] for row in rows))


READING = f"""Each fault happens at a random moment. Then its cause ends, the same command starts again, and its \
result is compared with a run without a fault.

- *Bit-equal*: the same command ended with the same weights, optimizer, metrics and records, and no process was left.
- *One line*: the command refused with one clear line. After the repair that the line asks for, it ended bit-equal.
- *Fell short*: anything else.

[`{FILE}`]({FILE}) has a row for each command and number of processes."""
