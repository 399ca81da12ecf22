"""Figures of ratios: stacked bars of each layer after the last epoch, and lines of some layers over the epochs."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exnorm.report.palette import OTHER, colour
from exnorm.runs.layer_ratios import bottom_middle_top, symmetric_kl

TITLES = {"lambda": "ratio", "mean": "ratio of\nthe mean", "var": "ratio of\nthe variance"}
PHONE_INCHES = 3.7  # the width of a figure that a phone shows without shrinking it
LETTERS = 8  # pt, size of the names of layers
LETTER_INCHES = 0.067  # width of a letter in the name of a layer
LEGEND_INCHES = 1.15  # width of an entry of the legend
TITLE_INCHES = 0.085  # width of a letter of the title
DASHES = {"lambda": "-", "mean": "-", "var": "--"}


def stacked(frame: pd.DataFrame, title: str) -> Figure:
    """Draw a bar for each layer, from the input down, in a panel for each kind of ratio and one for SN's divergence."""
    last = frame.query("epoch == epoch.max()")
    kinds, layers = list(last.kind.unique()), list(last.layer.unique())
    diverging = {"mean", "var"} <= set(kinds)
    count = len(kinds) + diverging
    width = LETTER_INCHES * max(map(len, layers)) + 0.75 * count
    figure = Figure(figsize=(max(PHONE_INCHES, width), 0.19 * len(layers) + 1.3), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=False):
        wide = last.query("kind == @kind").pivot_table(index="layer", columns="normalizer", values="mean", sort=False)
        before = pd.Series(0.0, index=wide.index)
        for normalizer in wide.columns:
            panel.barh(wide.index, wide[normalizer], left=before, color=colour(normalizer), label=normalizer.upper())
            before = before + wide[normalizer]
        panel.set(xlim=(0, 1), xticks=(0, 1))
        panel.set_title(TITLES[kind], fontsize=LETTERS)
    if diverging:
        wide = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="mean", sort=False)
        panels[-1].barh(wide.index, symmetric_kl(wide["mean"], wide["var"]).replace(np.inf, np.nan), color=OTHER)
        panels[-1].set_title("symmetric\nKL (nats)", fontsize=LETTERS)
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=2, steps=[1, 2, 5, 10], prune="lower"))
    panels[0].set_ylim(len(layers) - 0.4, -0.6)
    for panel in panels:
        panel.tick_params(labelsize=LETTERS)
    _finish_narrow(figure, panels[0], title)
    return figure


def dynamics(frame: pd.DataFrame, title: str) -> Figure:
    """Draw the ratios of a bottom, a middle and a top layer after each epoch. Shaded: the deviation over samples."""
    chosen = bottom_middle_top(list(frame.query("epoch == epoch.max()").layer.unique()))
    figure = Figure(figsize=(PHONE_INCHES, 1.6 * len(chosen) + 1.2), layout="constrained")
    panels = figure.subplots(len(chosen), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, layer in zip(panels, chosen, strict=True):
        of_layer = frame.query("layer == @layer")
        for kind, normalizer in of_layer[["kind", "normalizer"]].drop_duplicates().itertuples(index=False):
            line = of_layer.query("kind == @kind and normalizer == @normalizer")
            label = f"{normalizer.upper()} {kind if kind != 'lambda' else ''}".strip()
            panel.plot(line.epoch, line["mean"], DASHES[kind], marker=".", color=colour(normalizer), label=label)
            mean, spread = line["mean"].to_numpy(float), line["std"].to_numpy(float)
            if not np.isnan(spread).all():
                panel.fill_between(
                    line.epoch, mean - spread, mean + spread, color=colour(normalizer), alpha=0.2, linewidth=0
                )
        panel.set(ylabel="ratio", ylim=(0, 1))
        panel.set_title(layer, fontsize=LETTERS + 1)
        panel.tick_params(labelsize=LETTERS)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("epoch")
    _finish_narrow(figure, panels[0], title)
    return figure


def finish(figure: Figure, panel: Axes, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right lower", frameon=False)
    figure.suptitle(title, fontsize=10)


def _finish_narrow(figure: Figure, panel: Axes, title: str) -> None:
    """Put the legend below the figure, and the title, in lines as wide as the figure, above it."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() / LEGEND_INCHES))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=LETTERS + 1)
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / TITLE_INCHES)), fontsize=10)
