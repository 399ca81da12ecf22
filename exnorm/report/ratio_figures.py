"""Figures of ratios: each layer's after the last epoch as stacked bars, and some layers' over the epochs."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exnorm.report.palette import OTHER, colour
from exnorm.runs.layer_ratios import bottom_middle_top, symmetric_kl

TITLES = {"lambda": "ratio", "mean": "ratio of the mean", "var": "ratio of the variance"}
DASHES = {"lambda": "-", "mean": "-", "var": "--"}


def stacked(frame: pd.DataFrame, title: str) -> Figure:
    """A bar for each layer from the input to the output; a panel for each kind of ratio, and for SN's divergence."""
    last = frame.query("epoch == epoch.max()")
    kinds, layers = list(last.kind.unique()), list(last.layer.unique())
    diverging = {"mean", "var"} <= set(kinds)
    count = len(kinds) + diverging
    figure = Figure(figsize=(max(6.0, 0.22 * len(layers)), 2.2 * count + 0.4), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for panel, kind in zip(panels, kinds, strict=False):
        wide = last.query("kind == @kind").pivot_table(index="layer", columns="normalizer", values="mean", sort=False)
        below = pd.Series(0.0, index=wide.index)
        for normalizer in wide.columns:
            panel.bar(wide.index, wide[normalizer], bottom=below, color=colour(normalizer), label=normalizer.upper())
            below = below + wide[normalizer]
        panel.set(ylabel=TITLES[kind], ylim=(0, 1))
    if diverging:
        wide = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="mean", sort=False)
        panels[-1].bar(wide.index, symmetric_kl(wide["mean"], wide["var"]).replace(np.inf, np.nan), color=OTHER)
        panels[-1].set_ylabel("symmetric KL (nats)")
    panels[-1].tick_params(axis="x", rotation=90, labelsize=7)
    finish(figure, panels[0], title)
    return figure


def dynamics(frame: pd.DataFrame, title: str) -> Figure:
    """The ratios of a bottom, a middle and a top layer after each epoch; shaded, the deviation over samples."""
    chosen = bottom_middle_top(list(frame.query("epoch == epoch.max()").layer.unique()))
    figure = Figure(figsize=(3.2 * len(chosen) + 1, 3.0), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
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
        panel.set(title=layer, xlabel="epoch", ylim=(0, 1))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("ratio")
    finish(figure, panels[0], title)
    return figure


def finish(figure: Figure, panel: Axes, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right lower", frameon=False)
    figure.suptitle(title, fontsize=10)
