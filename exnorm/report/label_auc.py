"""What `exnorm ratios --wrong-labels` measured, as a figure and as a sentence."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from exnorm.runs.layer_ratios import LOSS


def sentence(frame: pd.DataFrame) -> str:
    """Return how well the ratios tell wrong labels, beside the loss."""
    loss: Any = frame[frame.layer == LOSS].iloc[0]
    ratios = frame[frame.layer != LOSS]
    best: Any = ratios.loc[ratios.auc.idxmax()]
    above = f"{int((ratios.low > 0.5).sum())} of {len(ratios)}"
    return (
        f"Do EN's ratios of a training image tell whether its label is wrong? The AUC is {ratios.auc.min():.2f} to "
        f"{best.auc:.2f} ({best.layer}), where 0.5 is chance, and its interval is above 0.5 in {above} rows. "
        f"That of the loss on the given label is {loss.auc:.2f}. Measured on {loss.images} images."
    )


def draw(frame: pd.DataFrame, title: str) -> Figure:
    """Draw the AUC of each layer with its interval, and that of the loss as a line."""
    ratios, loss = frame[frame.layer != LOSS], float(frame[frame.layer == LOSS].auc.iloc[0])
    figure = Figure(figsize=(max(6.0, 0.26 * len(ratios)), 3.2), layout="constrained")
    panel = figure.subplots()
    ends = [ratios.auc - ratios.low, ratios.high - ratios.auc]
    panel.errorbar(ratios.layer, ratios.auc, ends, fmt="o", markersize=3, capsize=2, color="0.3", label="ratios")
    panel.axhline(loss, color="black", linewidth=0.9, linestyle="--", label="loss")
    panel.axhline(0.5, color="black", linewidth=0.6, linestyle=":", label="chance")
    panel.set_ylabel("AUC for a wrong label", fontsize=8)
    panel.tick_params(axis="x", rotation=90, labelsize=7)
    panel.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
