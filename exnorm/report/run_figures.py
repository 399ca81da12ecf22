"""The curves of one run: loss, primary metric and learning rate over the epochs, from its `metrics.jsonl`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exnorm.config.metrics import Metric
from exnorm.report.palette import COLOURS, shade
from exnorm.report.ratio_figures import PHONE_INCHES
from exnorm.runs.metrics import validated

Rows = Sequence[dict[str, Any]]
NAMES = {"train": "training", "val": "validation"}
TINTS = {"train": COLOURS["ln"], "val": COLOURS["in"], "lr": COLOURS["bn"]}


class Best(NamedTuple):
    """The first epoch with the best primary metric in validation, and that metric."""

    epoch: int
    value: float


def best_epoch(log: Rows, primary: Metric) -> Best | None:
    """Return the best epoch so far; None before the first one has ended."""
    found = [Best(row["epoch"], row[primary.key]) for row in validated(log) if row.get(primary.key) is not None]
    choose = max if primary.larger_is_better else min
    return choose(found, key=lambda best: best.value, default=None)


def curves(log: Rows, primary: Metric) -> list[tuple[str, Callable[[], Figure]]]:
    """Return names and drawing functions of the figures; none before an epoch has ended."""
    ended, best = validated(log), best_epoch(log, primary)
    if best is None:
        return []
    steps_per_epoch = ended[0]["step"] / ended[0]["epoch"]
    found = []
    # The last part of a metric's name, and its axis.
    panels = {"loss": "loss", primary.name: primary.heading, "lr": "learning rate"}
    for part, label in panels.items():
        rows = log if part == "lr" else ended  # the rate also within epochs
        at = [row["step"] / steps_per_epoch for row in rows]
        keys = [key for key in ended[-1] if key.rpartition("/")[2] == part]
        lines = {key: [_number(row.get(key)) for row in rows] for key in keys}
        found.append((label, partial(draw_curve, label, at, lines, best)))
    return found


def draw_curve(label: str, at: Sequence[float], lines: dict[str, list[float]], best: Best) -> Figure:
    """Draw a line for each metric over the epochs, and a dotted vertical line at the best epoch."""
    figure = Figure(figsize=(PHONE_INCHES, 2.6), layout="constrained")
    panel = figure.subplots()
    panel.axvline(best.epoch, color="black", linestyle=":", linewidth=1, label=f"best epoch, {best.epoch}")
    sets = [key for key in lines if key.count("/") > 1]  # of several validation sets
    for key, values in lines.items():
        split = key.rpartition("/")[0]
        tint = shade(sets.index(key), len(sets)) if key in sets else TINTS[split or key]
        name = NAMES.get(split, split.removeprefix("val/")) or None
        panel.plot(at, values, marker="." if len(at) < 50 else "", color=tint, label=name, linewidth=1.3)
    panel.set(xlabel="epoch", ylabel=label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    panel.grid(axis="y", alpha=0.3)
    panel.tick_params(labelsize=9)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _number(value: float | None) -> float:
    """Return NaN, which leaves a gap in the line, for a metric that is missing or was not finite."""
    return np.nan if value is None else value
