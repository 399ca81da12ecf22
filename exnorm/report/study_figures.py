"""The figures of a study, each with the numbers that it shows, from the study's record."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exnorm.config.study import Cell, Study
from exnorm.report import class_figures, label_auc
from exnorm.report.class_variance import sentence
from exnorm.report.measured import measured
from exnorm.report.palette import COLOURS, colour, shade
from exnorm.report.published import published
from exnorm.report.ratio_figures import dynamics, stacked
from exnorm.report.study_table import column_of
from exnorm.runs.layer_ratios import LABEL_COLUMNS, bottom_middle_top
from exnorm.runs.records import PRIMARY, Row, read_records

MARKERS = "osD^vP*Xh<>"
LETTER_INCHES = 0.065  # width of a letter in a legend or a label
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "exnorm", "axes.spines.top": False, "axes.spines.right": False}
NORMALIZERS = ("in", "ln", "bn")


@dataclass(frozen=True)
class StudyFigure:
    """The name of a figure, its numbers, and the function that draws them."""

    name: str
    data: pd.DataFrame
    draw: Callable[[pd.DataFrame], Figure]


def figures_of(study: Study, results: Path) -> list[StudyFigure]:
    """Return the figures for which the study's record has numbers."""
    rows = read_records(results, study.id)
    found = [
        StudyFigure("accuracy", accuracy_data(study, rows), lambda data: draw_accuracy(study, data)),
        StudyFigure("curves", curve_data(study, results), lambda data: draw_curves(study, data)),
        StudyFigure("mean_ratios", ratio_data(study, rows), lambda data: draw_mean_ratios(study, data)),
    ]
    for cell in study.followed:
        frame, title = layer_data(study, cell, results), f"{titled(study)}: {called(study, dict(cell.key))}, seed 0"
        last = frame.query("epoch == epoch.max()")
        found.append(StudyFigure(_named("layers", cell), last, partial(stacked, title=title)))
        if frame.epoch.nunique() > 1:
            followed: Any = frame[frame.layer.isin(bottom_middle_top(list(last.layer.unique())))]
            found.append(StudyFigure(_named("dynamics", cell), followed, partial(dynamics, title=title)))
    found += class_figures_of(study, results)
    for cell in study.by_label:
        title = f"{titled(study)}: {called(study, dict(cell.key))}, seed 0"
        frame = label_data(study, cell, results)
        found.append(StudyFigure(_named("wrong_labels", cell), frame, partial(label_auc.draw, title=title)))
    return [figure for figure in found if not figure.data.empty]


def titled(study: Study) -> str:
    """Return the study and its scale, for the titles of figures of single cells."""
    return f"{study.id}, scale {study.scale}"


def class_figures_of(study: Study, results: Path) -> list[StudyFigure]:
    """Return the figures by class: those of each cell on its own data, and the differences between pairs of cells."""
    found = []
    frames = {cell: class_data(study, cell, results) for cell in study.by_class}
    for cell, frame in frames.items():
        if cell.evaluate or frame.empty:
            continue
        for kind, (data_of, draw) in class_figures.OF_ONE.items():
            title = f"{titled(study)}: {called(study, dict(cell.key))}, seed 0"
            data = data_of(frame)
            found.append(StudyFigure(_named(kind, cell), data, lambda data, draw=draw, title=title: draw(data, title)))
    differences = difference_data(study, frames)
    found.append(
        StudyFigure(
            "differences", differences, lambda data: class_figures.draw_differences(data, f"{titled(study)}, seed 0")
        )
    )
    return found


def class_remarks(study: Study, results: Path) -> list[str]:
    """Return what was measured of EN's ratios: where their variance lies, and what they tell of wrong labels."""
    lines = []
    for cell in (cell for cell in study.by_class if not cell.evaluate):
        if said := sentence(class_data(study, cell, results)):
            lines.append(f"{called(study, dict(cell.key))}, seed 0: {said[0].lower()}{said[1:]}")
    for cell in study.by_label:
        frame = label_data(study, cell, results)
        lines += [] if frame.empty else [f"{called(study, dict(cell.key))}, seed 0: {label_auc.sentence(frame)}"]
    return lines


def label_data(study: Study, cell: Cell, results: Path) -> pd.DataFrame:
    """Return how well the ratios of a cell's first seed tell wrong labels."""
    rows = [{name: row[name] for name in LABEL_COLUMNS} for row in _rows_of(study, cell, results, "labels")]
    return pd.DataFrame(rows, columns=list(LABEL_COLUMNS)).astype(LABEL_COLUMNS)


def class_data(study: Study, cell: Cell, results: Path) -> pd.DataFrame:
    """Return the ratios by class of a cell's first seed."""
    rows = _rows_of(study, cell, results, "classes")
    columns = ["epoch", "layer", "class", "normalizer", "images", "mean", "std"]
    frame = pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)
    return frame.astype({"epoch": int, "images": int, "mean": float, "std": float})


def difference_data(study: Study, frames: Mapping[Cell, pd.DataFrame]) -> pd.DataFrame:
    """Return the differences of ratios in each layer, for the pairs of cells that the study names and has measured."""
    parts = [pd.DataFrame(columns=["pair", "layer", "normalizer", "difference"])]
    for pair in study.values.get("ratio_differences", ()):
        left, right = study.cell(pair["left"]), study.cell(pair["right"])
        if not (frames[left].empty or frames[right].empty):
            data = class_figures.difference_data(frames[left], frames[right])
            data.insert(0, "pair", f"{called(study, dict(left.key))} minus {called(study, dict(right.key))}")
            parts.append(data)
    return pd.concat(parts[1:] or parts)


def file_of(path: Path, suffix: str) -> Path:
    """Return the file of a figure. Its name may have dots, as that of a cell with rate=0.2."""
    return path.with_name(f"{path.name}{suffix}")


def save(figure: StudyFigure, path: Path) -> None:
    """Write a figure as SVG and as PNG."""
    with rc_context(STYLE):
        drawn = figure.draw(figure.data)
        drawn.savefig(file_of(path, ".svg"), metadata={"Date": None})
        drawn.savefig(file_of(path, ".png"), dpi=120)


def accuracy_data(study: Study, rows: Sequence[Row]) -> pd.DataFrame:
    """Return the first metric of each cell: number of seeds, mean, deviation, and the paper's number."""
    metric = study.metrics[0]
    values = measured(study, rows, metric)
    lines = []
    for cell in study.cells:
        if cell.name in values:
            ours, paper = values[cell.name], published(study, cell, metric)
            numbers = {"n": ours.n, "mean": ours.mean, "std": ours.std, "published": paper.value if paper else None}
            lines.append({**dict(cell.key), **numbers})
    return pd.DataFrame(lines)


def draw_accuracy(study: Study, data: pd.DataFrame) -> Figure:
    """Draw accuracy over the axis `columns`, a line for each choice of the other axes; on the right, the paper's."""
    axis = study.values.get("columns", next(iter(study.axes)))
    sides = [("mean", f"measured, scale {study.scale}")]
    if data["published"].notna().to_numpy().any():
        sides.append(("published", f"{study.values.get('paper', '')}, {study.values.get('table', '')}"))
    there = {dict(cell.key)[axis] for cell in study.cells}
    places = {value: place for place, value in enumerate(value for value in study.axes[axis] if value in there)}
    joined = "columns" in study.values and axis != "norm"  # values without an order are not joined
    drawn = _lines(study, data, axis)
    width = max(3.4, 0.62 * len(places) + 1.4) * len(sides) + LETTER_INCHES * max(len(label) for label, _ in drawn)
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for panel, (column, title) in zip(panels, sides, strict=True):
        for number, (label, points) in enumerate(drawn):
            key = {name: str(points[name].iloc[0]) for name in study.axes}
            tint, dash = look(study, key, axis, number)
            style: Any = {"color": tint, "marker": MARKERS[number % len(MARKERS)]}
            style["linestyle"] = dash if joined else "none"
            for part in _series(points, axis):
                at = np.array([places[value] for value in part[axis]]) + (0.06 * number if column == "mean" else 0.0)
                spread = part["std"].where(part["n"] > 1) if column == "mean" else None
                panel.errorbar(at, part[column].astype(float), spread, capsize=2, markersize=4, label=label, **style)
        labels = [study.label(value) if column == "mean" else value for value in places]  # the paper has no stand-ins
        panel.set_xticks(list(places.values()), labels, rotation=40, ha="right")
        panel.set_xlabel(axis)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(column_of(study, study.metrics[0]).heading)
    _legend(figure, panels)
    return figure


def curve_data(study: Study, results: Path) -> pd.DataFrame:
    """Return the primary metric in validation after each epoch, of each cell with its own training.

    It has the mean and the deviation over seeds.
    """
    rows = [row for row in read_records(results, study.id, "epochs") if row["scale"] == study.scale]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows).astype({"epoch": int, PRIMARY: float})
    grouped = frame.groupby(["cell", "epoch"], sort=False)[PRIMARY].agg(["count", "mean", "std"]).reset_index()
    return grouped.rename(columns={"count": "n"})


def draw_curves(study: Study, data: pd.DataFrame) -> Figure:
    """Draw learning curves, with a panel for each value of the axis `columns`."""
    axis = study.values.get("columns")
    groups: dict[str, list[Cell]] = {}
    for cell in study.cells:
        if cell.name in set(data.cell):
            groups.setdefault(dict(cell.key)[axis] if axis else "", []).append(cell)
    across = min(len(groups), 5)
    down = -(-len(groups) // across)
    longest = max(len(called(study, dict(cell.key))) for cell in study.cells)
    figure = Figure(figsize=(2.6 * across + 1.2 + LETTER_INCHES * longest, 2.4 * down + 0.4), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for panel, (value, cells) in zip(panels, groups.items(), strict=False):
        for number, cell in enumerate(cells):
            line: Any = data[data.cell == cell.name]
            label = called(study, {name: value for name, value in cell.key if name != axis})
            tint, dash = look(study, dict(cell.key), axis, number)
            panel.plot(line.epoch, line["mean"], dash, color=tint, label=label, linewidth=1.2)
            spread = line["std"].fillna(0.0)
            panel.fill_between(line.epoch, line["mean"] - spread, line["mean"] + spread, color=tint, alpha=0.2)
        panel.set_title(study.label(value), fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    figure.supxlabel("number of the validation" if counts_steps(study) else "epoch", fontsize=9)
    panels[0].set_ylabel(f"validation {study.primary.heading}")
    figure.suptitle(f"scale {study.scale}", fontsize=9)
    _legend(figure, panels)
    return figure


def counts_steps(study: Study) -> bool:
    """Return whether the length of its trainings is set in steps. An "epoch" is then the number of a validation."""
    return any(text.startswith("trainer.steps=") for cell in study.cells for text in cell.train)


def ratio_data(study: Study, rows: Sequence[Row]) -> pd.DataFrame:
    """Return the mean ratio of each normalizer over all layers and seeds, for each cell that has ratios."""
    shares = {name: measured(study, rows, f"ratio/{name}") for name in NORMALIZERS}
    lines = [
        {"cell": cell.name, "normalizer": name, "mean": values[cell.name].mean, "std": values[cell.name].std}
        for cell in study.cells
        for name, values in shares.items()
        if cell.name in values and not cell.evaluate  # an evaluation has the ratios of its run
    ]
    return pd.DataFrame(lines)


def draw_mean_ratios(study: Study, data: pd.DataFrame) -> Figure:
    """Draw a stacked bar for each cell."""
    cells = [cell for cell in study.cells if cell.name in set(data.cell)]
    labels = [called(study, dict(cell.key)) for cell in cells]
    height = 2.6 + LETTER_INCHES * max(map(len, labels))
    figure = Figure(figsize=(max(4.0, 0.34 * len(cells) + 1.6), height), layout="constrained")
    panel = figure.subplots()
    below = np.zeros(len(cells))
    for name in NORMALIZERS:
        heights = data[data.normalizer == name].set_index("cell")["mean"].reindex([cell.name for cell in cells])
        panel.bar(range(len(cells)), heights.fillna(0.0), bottom=below, color=colour(name), label=name.upper())
        below = below + heights.fillna(0.0).to_numpy()
    panel.set_xticks(range(len(cells)), labels, rotation=90, fontsize=7)
    panel.set(ylabel="mean ratio over layers", ylim=(0, 1))
    panel.set_title(f"scale {study.scale}", fontsize=9)
    _legend(figure, [panel])
    return figure


def layer_data(study: Study, cell: Cell, results: Path) -> pd.DataFrame:
    """Return the ratios of all layers of a cell's first seed."""
    rows = _rows_of(study, cell, results, "layers")
    columns = ["epoch", "layer", "kind", "normalizer", "mean", "std"]
    frame = pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)
    return frame.replace({"std": {"": None}}).astype({"epoch": int, "mean": float, "std": float})


def _rows_of(study: Study, cell: Cell, results: Path, kind: str) -> list[Row]:
    rows = read_records(results, study.id, kind)
    return [row for row in rows if row["scale"] == study.scale and row["cell"] == cell.name]


def _named(kind: str, cell: Cell) -> str:
    return "-".join([kind, *(value for _, value in cell.key)])


def _lines(study: Study, data: pd.DataFrame, axis: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the label and the points of each line of the figure, in the order of the study."""
    others = [name for name in study.axes if name != axis]
    if not others:
        return [(study.id, data)]
    groups: Any = data.groupby(others, sort=False)
    return [(called(study, dict(zip(others, key, strict=True))), lines) for key, lines in groups]


def _series(points: pd.DataFrame, axis: str) -> list[pd.DataFrame]:
    """Split a line into parts. Batch settings with the same number of replicas are one part."""
    if axis != "batch":
        return [points]
    groups: Any = points.groupby(points[axis].str.partition("x")[0], sort=False)
    return [part for _, part in groups]


def called(study: Study, values: Mapping[str, str]) -> str:
    """Return the label of axis values in a legend. An axis that shares values with another axis is named."""
    shared = {axis for axis, of in study.axes.items() if any(set(of) & set(study.axes[o]) for o in values if o != axis)}
    return " ".join(f"{axis} {study.label(v)}" if axis in shared else study.label(v) for axis, v in values.items())


def look(study: Study, key: dict[str, str], across: str | None, number: int) -> tuple[str, str]:
    """Return the colour of a line, which is the normalizer's, and its dash, which shows the values of other axes.

    Without an axis `norm`, the colour is a shade.

    Args:
        across: the axis whose values are ticks or panels, not lines.
        number: position of the line in the study's order.
    """
    others = {axis: tuple(values) for axis, values in study.axes.items() if axis != across}
    if "norm" not in others:
        return shade(number, math.prod(map(len, others.values()))), "-"
    rest = {axis: values for axis, values in others.items() if axis != "norm"}
    choices = list(itertools.product(*rest.values()))
    place = choices.index(tuple(key[axis] for axis in rest))
    grey = [value for value in others["norm"] if value not in COLOURS]
    if key["norm"] in grey:  # variants share a colour
        place += len(choices) * grey.index(key["norm"])
    return colour(key["norm"]), DASHES[place % len(DASHES)]


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Draw a legend with one entry for each line of the panels."""
    found = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False, fontsize=8)
