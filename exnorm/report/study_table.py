"""`exnorm table STUDY`: the measured numbers beside the published ones, from the study's record.

Entries are the mean ± standard deviation (seeds). Among cells that differ in one axis only, bold marks the best one if
the 95 % interval of its difference to the next one, over equal seeds, excludes 0.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from exnorm.config.errors import UserError
from exnorm.config.study import Cell, Study
from exnorm.report.grids import Entry, Grid, to_html, to_markdown, to_tex
from exnorm.report.measured import Measured, measured
from exnorm.report.published import published
from exnorm.report.tests_of_difference import interval_of
from exnorm.runs.records import DIVERGED_AT, Row, read_records
from exnorm.runs.sinks import csv_text

NOT_AVAILABLE = "not available"
NOTHING = Entry("–")


class Column(NamedTuple):
    """How tables show a metric.

    Attributes:
        compared: whether the best cells are marked: those with the largest or the smallest value.
        is_constant: whether all seeds may have the same value, which then has no deviation.
        is_percentage: whether the paper's number may stand beside it.
    """

    heading: str
    digits: int
    compared: Literal["largest", "smallest"] | None = None
    is_constant: bool = False
    is_percentage: bool = False


COSTS = {
    "parameters_m": Column("parameters (M)", 3, is_constant=True),
    "gflops": Column("GFLOPs", 4, is_constant=True),
    "images_per_s": Column("images/s in training", 0, is_constant=True),
}


def column_of(study: Study, name: str) -> Column:
    """Return how tables of a study show a metric: of its task, a cost, or any other under its own name."""
    for metric in study.task_metrics:
        if metric.name == name:
            best = ("largest" if metric.larger_is_better else "smallest") if metric.unit else None
            return Column(metric.heading, metric.digits, compared=best, is_percentage=metric.unit == "%")
    return COSTS.get(name, Column(name, 4))


@dataclass(frozen=True)
class StudyTable:
    """The table of a study, in several arrangements, and its footnotes."""

    study: Study
    rows: Sequence[Row]

    def grids(self) -> list[tuple[str, Grid]]:
        """Return the tables: one across the axis `columns`, if the study has one, and one with a row for each cell."""
        across = [(self.caption(), self.across())] if "columns" in self.study.values else []
        title = "Cell by cell" + (", with the paper's numbers" if self.study.values.get("published") else "")
        return [*across, (title if across else "", self.by_cell())]

    def caption(self) -> str:
        """Return the caption of the table of `across`."""
        return f"{column_of(self.study, self.study.metrics[0]).heading} by {self.study.values['columns']}"

    def across(self) -> Grid:
        """Return the first metric, with the values of one axis side by side."""
        axis, metric = self.study.values["columns"], self.study.metrics[0]
        others = [name for name in self.study.axes if name != axis]
        values = measured(self.study, self.rows, metric)
        best = self._best(metric)
        lines: dict[tuple[str, ...], dict[str, Entry]] = {}  # by the other values of a row, and that of the column
        for cell in self.study.cells:
            key = dict(cell.key)
            entries = lines.setdefault(tuple(key[name] for name in others), {})
            entries[key[axis]] = self._entry(cell, values.get(cell.name), metric, cell.name in best)
        columns = [value for value in self.study.axes[axis] if any(value in entries for entries in lines.values())]
        rows = [
            [*(Entry(self.study.label(other)) for other in of), *(entries.get(v, Entry("")) for v in columns)]
            for of, entries in lines.items()
        ]
        return Grid([*others, *map(self.study.label, columns)], rows)

    def by_cell(self) -> Grid:
        """Return a row for each cell: every metric, and beside an accuracy the published number and the difference."""
        heads, columns = (
            list(self.study.axes),
            [[Entry(self.study.label(v)) for _, v in c.key] for c in self.study.cells],
        )
        for metric in self.study.metrics:
            values, best = measured(self.study, self.rows, metric), self._best(metric)
            column = column_of(self.study, metric)
            heads.append(column.heading)
            beside = column.is_percentage and "published" in self.study.values
            if beside:
                heads += ["published", *(["difference"] if self.has_papers_data else [])]
            for line, cell in zip(columns, self.study.cells, strict=True):
                line.append(self._entry(cell, values.get(cell.name), metric, cell.name in best))
                if beside:
                    line += self._beside(cell, values.get(cell.name), metric)
        return Grid(heads, columns)

    def footnotes(self) -> list[str]:
        """Return what a reader of the numbers has to know."""
        lines = ["Mean ± standard deviation over seeds (number of seeds); the last epoch counts."]
        if self.study.scale != "full" and "paper" in self.study.values:
            stand_ins = self._stand_ins()
            lines.append(
                f"Scale {self.study.scale}: nothing here was measured on the paper's data"
                + (f" ({stand_ins})" if stand_ins else "")
                + ". The published numbers are of another task."
            )
        return [*lines, *self.study.scale_notes, *self.remarks(), *self._origin()]

    def remarks(self) -> list[str]:
        """Return the footnotes that are about this study alone."""
        lines = list(self.study.notes)
        if "images_per_s" in self.study.metrics:
            lines.append("images/s is the median over epochs. Several runs may have shared the machine.")
        lines += [*self._published_notes(), *self._facts()]
        for cell, steps in measured(self.study, self.rows, DIVERGED_AT).items():
            seeds = ", ".join(f"seed {seed} at step {step:.0f}" for seed, step in steps.by_seed.items())
            lines.append(f"{cell} diverged (its loss was not finite): {seeds}. Means and differences exclude it.")
        return lines

    def _origin(self) -> list[str]:
        """Return the devices, versions, commits and hours behind the numbers."""
        rows = self.rows_of(self.study.primary.name)
        found = {name: ", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("device", "torch", "commit")}
        lines = [f"{name}{' ' if name == 'torch' else ': '}{texts}." for name, texts in found.items() if texts]
        changed = {row["run"] for row in rows if row["uncommitted"] == "yes"}
        if changed:
            lines.append(f"{len(changed)} of the runs were made with uncommitted changes.")
        hours = self.hours()
        return [*lines, f"Runs: {len(hours)}, with {sum(hours.values()):.1f} hours of training in all."]

    def hours(self) -> dict[str, float]:
        """Return the hours of training of each run. Several cells may share a run."""
        return {row["run"]: float(row["hours"]) for row in self.rows_of(self.study.primary.name)}

    def rows_of(self, metric: str) -> list[Row]:
        """Return the rows of one metric at the study's scale."""
        return [row for row in self.rows if row["scale"] == self.study.scale and row["metric"] == metric]

    def _published_notes(self) -> list[str]:
        """Return the notes on the published numbers."""
        cells: dict[str, list[str]] = {}
        for cell in self.study.cells:
            for metric in (name for name in self.study.metrics if column_of(self.study, name).is_percentage):
                paper = published(self.study, cell, metric)
                if paper is not None and paper.note:
                    cells.setdefault(paper.note, []).append(f"{paper.text} at {cell.name}")
        return [f"Published {', '.join(names)}: {note}." for note, names in cells.items()]

    def _facts(self) -> list[str]:
        """Return a line for each group of settings and, if there are several groups, their cells."""
        by_fact: dict[str, dict[str, None]] = {}
        for row in self.rows_of(self.study.primary.name):
            by_fact.setdefault(row["facts"], {})[row["cell"]] = None
        if len(by_fact) == 1:
            return [f"Settings: {fact}." for fact in by_fact]
        return [f"Settings: {fact} for {'; '.join(cells)}." for fact, cells in by_fact.items()]

    def _entry(self, cell: Cell, value: Measured | None, metric: str, best: bool) -> Entry:
        if value is None:
            return Entry("diverged") if cell.name in measured(self.study, self.rows, DIVERGED_AT) else NOTHING
        column = column_of(self.study, metric)
        digits = column.digits
        constant = column.is_constant and round(value.std or 0, digits) == 0
        spread = "" if value.std is None or constant else f" ± {value.std:.{digits}f}"
        return Entry(f"{value.mean:.{digits}f}{spread} ({value.n})", best)

    def _stand_ins(self) -> str:
        used = [value for values in self.study.axes.values() for value in values if value in self.study.stand_ins]
        return ", ".join(f"{self.study.stand_ins[value]} for {value}" for value in dict.fromkeys(used))

    def _best(self, metric: str) -> set[str]:
        """Return the cells with the best mean among the cells that differ only in the compared axis."""
        compared = column_of(self.study, metric).compared
        if compared is None:
            return set()
        axis = self.study.values.get("compare", "norm" if "norm" in self.study.axes else next(iter(self.study.axes)))
        values = measured(self.study, self.rows, metric)
        groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
        for cell in self.study.cells:
            if cell.name in values:
                groups.setdefault(tuple(item for item in cell.key if item[0] != axis), []).append(cell)
        found = set()
        for group in (group for group in groups.values() if len(group) > 1):
            ranked = sorted((values[cell.name] for cell in group), key=lambda value: value.mean)
            first, second = ranked[:-3:-1] if compared == "largest" else ranked[:2]
            if _differ(first, second):
                found |= {cell.name for cell in group if values[cell.name] is first}
        return found

    @property
    def has_papers_data(self) -> bool:
        """Whether a difference from a published number is one of results; at other scales the data differ, too."""
        return self.study.scale == "full"

    def _beside(self, cell: Cell, ours: Measured | None, metric: str) -> list[Entry]:
        paper = published(self.study, cell, metric)
        entries = [Entry(NOT_AVAILABLE if paper is None else paper.text)]
        if not self.has_papers_data:
            return entries
        if ours is None or paper is None or paper.value is None:
            return [*entries, NOTHING]
        return [*entries, Entry(f"{ours.mean - paper.value:+.2f}")]


def _differ(first: Measured, second: Measured) -> bool:
    """Return whether the interval of the mean difference over equal seeds excludes 0."""
    seeds = first.by_seed.keys() & second.by_seed.keys()
    interval = interval_of([first.by_seed[seed] - second.by_seed[seed] for seed in sorted(seeds)])
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def table_of(study: Study, results: Path) -> StudyTable:
    """Return the table of a study.

    Raises:
        UserError: nothing was measured at this scale.
    """
    rows = read_records(results, study.id)
    if not any(row["scale"] == study.scale for row in rows):
        raise UserError(
            f"nothing was measured of {study.id} at scale {study.scale}. Type exnorm reproduce {study.named} "
            f"--scale {study.scale}"
        )
    return StudyTable(study, rows)


def as_markdown(table: StudyTable) -> str:
    """The table as a page."""
    study = table.study
    parts = [f"# {study.title}", _asked(study)]
    for title, grid in table.grids():
        parts += [f"## {title}"] if title else []
        parts.append(to_markdown(grid))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in table.footnotes())]) + "\n"


def as_tex(table: StudyTable) -> str:
    """The tables as `tabular`s of the package booktabs, with the footnotes as comments."""
    return (
        "\n".join([*(to_tex(grid) for _, grid in table.grids()), *(f"% {line}" for line in table.footnotes())]) + "\n"
    )


def as_html(table: StudyTable) -> str:
    """The tables and footnotes as HTML, without a page around them."""
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in table.footnotes())
    grids = "".join(
        (f"<h3>{html.escape(title)}</h3>" if title else "") + to_html(grid) for title, grid in table.grids()
    )
    return f"{grids}<ul class='notes'>{notes}</ul>\n"


def as_csv(table: StudyTable) -> str:
    """A line for each cell and metric, in plain numbers."""
    lines: list[list[Any]] = []
    lines.append([*table.study.axes, "metric", "n", "mean", "std", "published", "difference"])
    for metric in table.study.metrics:
        values = measured(table.study, table.rows, metric)
        for cell in table.study.cells:
            ours, printed = values.get(cell.name), published(table.study, cell, metric)
            paper = printed.value if printed else None
            numbers = [ours.mean if ours else None, ours.std if ours else None, paper]
            numbers.append(ours.mean - paper if table.has_papers_data and ours and paper is not None else None)
            texts = ["" if number is None else f"{number:.6g}" for number in numbers]
            lines.append([*(value for _, value in cell.key), metric, ours.n if ours else 0, *texts])
    return csv_text(lines)


FORMATS = {"md": as_markdown, "tex": as_tex, "csv": as_csv, "html": as_html}


def answers_to(study: Study) -> str:
    """Return the table of a paper that a study repeats, if it names one."""
    named = ", ".join(str(study.values[key]) for key in ("paper", "table") if key in study.values)
    return f"Paper and table: {named}." if named else "Paper: none."


def _asked(study: Study) -> str:
    command = f"exnorm reproduce {study.named} --scale {study.scale}"
    return f"{answers_to(study)} Study `{study.id}`, scale {study.scale}: `{command}`."
