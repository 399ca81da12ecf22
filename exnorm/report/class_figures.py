"""Figures of EN's ratios for single classes, from ratios by epoch, layer, class and normalizer.

Each figure has a function that returns the table of its numbers, and a function that draws the table.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from exnorm.report.class_variance import draw_variance, variance_data
from exnorm.report.palette import colour
from exnorm.report.ratio_figures import finish
from exnorm.runs.layer_ratios import bottom_middle_top

SHOWN_CLASSES = 4  # in the figure over training, evenly spaced among the measured ones; as many as in EN's paper
NO_LENGTH = 1e-9  # deviations below this are 0 up to rounding
FEWEST_CLASSES = 3  # of two classes the deviations from their mean are always opposite


def dynamics_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the ratios of four classes in a bottom, a middle and a top layer; empty for a single checkpoint."""
    if frame.epoch.nunique() < 2:
        return frame.iloc[:0]
    classes = list(frame["class"].unique())
    places = np.linspace(0, len(classes) - 1, min(SHOWN_CLASSES, len(classes))).round().astype(int)
    last = frame[frame.epoch == frame.epoch.max()]
    followed = bottom_middle_top(list(last.layer.unique()))
    shown = frame["class"].isin([classes[place] for place in places]) & frame.layer.isin(followed)
    return frame.loc[shown, ["epoch", "layer", "class", "normalizer", "mean", "std"]]


def draw_dynamics(data: pd.DataFrame, title: str) -> Figure:
    """Draw a row for each layer, a column for each class and a line for each normalizer. Shaded: the deviation."""
    layers, classes = list(data.layer.unique()), list(data["class"].unique())
    figure = Figure(figsize=(2.3 * len(classes) + 1.2, 1.9 * len(layers) + 0.6), layout="constrained")
    panels = figure.subplots(len(layers), len(classes), sharex=True, sharey="row", squeeze=False)
    groups: Any = data.groupby(["layer", "class", "normalizer"], sort=False)
    for (layer, label, normalizer), lines in groups:
        panel = panels[layers.index(layer), classes.index(label)]
        line = lines.sort_values("epoch")
        mean, spread = line["mean"].to_numpy(float), line["std"].to_numpy(float)
        tint = colour(normalizer)
        panel.plot(line.epoch, mean, marker=".", color=tint, label=normalizer.upper(), linewidth=1.2)
        panel.fill_between(line.epoch, mean - spread, mean + spread, color=tint, alpha=0.2, linewidth=0)
    for panel, label in zip(panels[0], classes, strict=True):
        panel.set_title(f"class {label}", fontsize=9)
    for panel, layer in zip(panels[:, 0], layers, strict=True):
        panel.set_ylabel(f"ratio, {layer}", fontsize=8)
    figure.supxlabel("epoch", fontsize=9)
    finish(figure, panels[0, 0], title)
    return figure


def spread_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how far ratios spread over images after the last epoch: within classes, and between the classes' means.

    For each layer and normalizer, within = sqrt(mean_c std_c^2), and between is the population deviation of mean_c over
    classes c. With equally many images of each class, the variance over all images is within^2 + between^2.
    """
    last = frame[frame.epoch == frame.epoch.max()]
    grouped: Any = last.groupby(["layer", "normalizer"], sort=False)
    return grouped.apply(
        lambda rows: pd.Series(
            {
                "mean": rows["mean"].mean(),
                "within": np.sqrt((rows["std"] ** 2).mean()),
                "between": rows["mean"].std(ddof=0),
            }
        ),
        include_groups=False,
    ).reset_index()


def draw_spread(data: pd.DataFrame, title: str) -> Figure:
    """Draw a panel for the deviation within classes and one for that between them; a line for each normalizer."""
    layers = list(data.layer.unique())
    figure = Figure(figsize=(max(6.0, 0.22 * len(layers)), 4.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for panel, column, label in zip(panels, ("within", "between"), ("within classes", "between classes"), strict=True):
        for normalizer, line in data.groupby("normalizer", sort=False):
            panel.plot(
                line.layer, line[column], marker=".", color=colour(str(normalizer)), label=str(normalizer).upper()
            )
        panel.set_ylabel(f"deviation {label}", fontsize=8)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[1].tick_params(axis="x", rotation=90, labelsize=7)
    finish(figure, panels[0], title)
    return figure


def similarity_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cosine of the centred ratio vectors (all layers and normalizers) of each pair of classes.

    The vectors are centred by the mean over classes, because uncentred vectors share what all classes have in common.
    Empty for fewer than FEWEST_CLASSES classes. A class at the mean has no direction; its cosine is NaN.
    """
    last = frame[frame.epoch == frame.epoch.max()]
    wide = last.pivot_table(index="class", columns=["layer", "normalizer"], values="mean", sort=False)
    if len(wide) < FEWEST_CLASSES:
        return pd.DataFrame(columns=["class", "other", "cosine"])
    centred = (wide - wide.mean()).to_numpy(float)
    length = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(length > NO_LENGTH, length, np.nan)[:, None]
    cosine = unit @ unit.T
    names = list(wide.index)
    rows = [(a, b, cosine[i, j]) for i, a in enumerate(names) for j, b in enumerate(names)]
    return pd.DataFrame(rows, columns=["class", "other", "cosine"])


def draw_similarity(data: pd.DataFrame, title: str) -> Figure:
    """Draw a square for each pair of classes."""
    wide = data.pivot_table(index="class", columns="other", values="cosine", sort=False, dropna=False)
    side = 0.11 * max(len(str(name)) for name in wide.index)
    figure = Figure(figsize=(5.4 + side, 4.8 + side), layout="constrained")
    panel = figure.subplots()
    drawn = panel.imshow(wide.to_numpy(float), vmin=-1, vmax=1, cmap="PuOr")
    panel.set_xticks(range(len(wide)), wide.columns, rotation=90, fontsize=8)
    panel.set_yticks(range(len(wide)), wide.index, fontsize=8)
    panel.set(xlabel="class", ylabel="class")
    figure.colorbar(drawn, label="cosine of centred ratio vectors")
    figure.suptitle(title, fontsize=10)
    return figure


def difference_data(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Return the mean ratio over classes, left minus right, of each layer and normalizer after the last epoch."""
    means = []
    for frame in (left, right):
        last = frame[frame.epoch == frame.epoch.max()]
        means.append(last.groupby(["layer", "normalizer"], sort=False)["mean"].mean())
    return (means[0] - means[1]).reindex(means[0].index).rename("difference").reset_index()


def draw_differences(data: pd.DataFrame, title: str) -> Figure:
    """Draw a panel for each pair, with bars for each layer and normalizer."""
    pairs = list(data.pair.unique())
    layers = list(data.layer.unique())
    figure = Figure(figsize=(max(7.5, 0.3 * len(layers) + 1.5), 1.9 * len(pairs) + 1.0), layout="constrained")
    panels = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
    normalizers = list(data.normalizer.unique())
    width = 0.8 / len(normalizers)
    for panel, pair in zip(panels, pairs, strict=True):
        for number, normalizer in enumerate(normalizers):
            bars = data[(data.pair == pair) & (data.normalizer == normalizer)].set_index("layer")["difference"]
            at = np.arange(len(layers)) + width * (number - (len(normalizers) - 1) / 2)
            panel.bar(at, bars.reindex(layers), width, color=colour(normalizer), label=normalizer.upper())
        panel.axhline(0, color="black", linewidth=0.6)
        panel.set_title(pair, fontsize=8, loc="left")
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    figure.supylabel("difference of ratios", fontsize=9)
    finish(figure, panels[0], title)
    return figure


OF_ONE = {  # the figures of one model on one data set
    "classes": (dynamics_data, draw_dynamics),
    "spread": (spread_data, draw_spread),
    "similarity": (similarity_data, draw_similarity),
    "variance": (variance_data, draw_variance),
}
