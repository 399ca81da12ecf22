"""Where the variance of EN's ratios lies: between layers, between classes, or within classes.

The ratios of an image in a layer are a vector of K shares. Variances are sums over the K shares. With C classes of n
images each, the mean squares between and within classes of a layer are, as in a one-way analysis of variance,

    B = n sum_k var_c(mean_ck)      over the classes, with C - 1 degrees of freedom
    W = sum_k mean_c(var_ck)        over the images of a class, with n - 1 degrees of freedom

The variance of the classes' true means is (B - W) / n, or 0 if that is negative. The intraclass correlation ICC(1) =
(B - W) / (B + (n - 1) W) is its share of the variance over images: 1 if a class determines the ratios, and 0 if it says
nothing of them.

P. E. Shrout and J. L. Fleiss, "Intraclass correlations: uses in assessing rater reliability", 1979.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

SHARES = ("between layers", "between classes", "within classes")
STATIC = 0.02  # a layer whose ratios deviate less than this over images mixes as SN does: the same for all images


def variance_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each layer after the last epoch, from ratios by class.

    Columns: layer, deviation (over images, the root of the sum of the next two), between and within (variances), icc.
    Empty for a single class, or a class with a single image.
    """
    last = frame[frame.epoch == frame.epoch.max()]
    grouped: Any = last.groupby("layer", sort=False)
    rows = [(layer, *_components(of_layer)) for layer, of_layer in grouped if _has_both(of_layer)]
    data = pd.DataFrame(rows, columns=["layer", "between", "within", "icc"])
    data.insert(1, "deviation", np.sqrt(data.between + data.within))
    return data


def _has_both(of_layer: pd.DataFrame) -> bool:
    return len(set(of_layer["class"])) > 1 and int(of_layer.images.min()) > 1


def _components(of_layer: pd.DataFrame) -> tuple[float, float, float]:
    """Return the variances between and within classes, and ICC(1). n is the mean number of images of a class."""
    n = float(of_layer.images.mean())
    means = of_layer.pivot_table(index="class", columns="normalizer", values="mean", sort=False)
    between = n * float(means.var(ddof=1).sum())
    of_image = of_layer["std"] ** 2 * of_layer.images / (of_layer.images - 1)
    within = float(of_image.groupby(of_layer.normalizer).mean().sum())
    total = between + (n - 1) * within
    return max(0.0, (between - within) / n), within, (between - within) / total if total else 0.0


def variance_shares(frame: pd.DataFrame) -> dict[str, float]:
    """Return the share in % of SHARES in the variance of the ratios over layers and images; empty without variance."""
    data = variance_data(frame)
    if len(data) < 2:
        return {}
    last = frame[(frame.epoch == frame.epoch.max()) & frame.layer.isin(data.layer)]
    means: Any = last.pivot_table(index="layer", columns="normalizer", values="mean", sort=False)
    parts = [float(means.var(ddof=1).sum()), float(data.between.mean()), float(data.within.mean())]
    return {name: 100 * part / sum(parts) for name, part in zip(SHARES, parts, strict=True)} if sum(parts) else {}


def sentence(frame: pd.DataFrame) -> str:
    """Return what the shares say, in a sentence or two; empty without variance."""
    shares, data = variance_shares(frame), variance_data(frame)
    if not shares:
        return ""
    parts = ", ".join(f"{share:.1f} % is {name}" for name, share in shares.items())
    static, icc = int((data.deviation < STATIC).sum()), data.icc.clip(lower=0)
    return (
        f"Of the variance of EN's ratios over layers and images, {parts}. Within a layer, the class explains "
        f"{icc.min():.0%} to {icc.max():.0%} of the variance over images (intraclass correlation). In {static} of "
        f"{len(data)} layers the ratios deviate by less than {STATIC} over images: there EN is a static mix."
    )


def draw_variance(data: pd.DataFrame, title: str) -> Figure:
    """Draw two panels over the layers: the deviation over images, and the share of it between classes."""
    figure = Figure(figsize=(max(6.0, 0.22 * len(data)), 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(data.layer, data.deviation, color="0.45")
    above.axhline(STATIC, color="black", linewidth=0.6, linestyle=":")
    above.set_ylabel("deviation over images", fontsize=8)
    below.bar(data.layer, data.icc.clip(lower=0), color="0.45")
    below.set_ylim(0, 1)
    below.set_ylabel("intraclass correlation", fontsize=8)
    below.tick_params(axis="x", rotation=90, labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
