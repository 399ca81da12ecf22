"""The figure of `exnorm explain`: images with the model's prediction, and the ratios of every layer."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from exnorm.report.palette import colour
from exnorm.report.ratio_figures import DASHES

ROW_INCHES = 2.0


def image_figure(explained: Sequence[Any], title: str) -> Figure:
    """Draw a row for each image: the crop, the most likely classes, and a line for each normalizer over the layers.

    `explained` has `name`, `pixels` (height, width, 3), `guesses` [(class, probability)] and `ratios` (a table of
    layer, kind, normalizer, mean).
    """
    figure = Figure(figsize=(9.0, ROW_INCHES * len(explained) + 1.2), layout="constrained")
    panels = figure.subplots(len(explained), 2, width_ratios=[1, 4], squeeze=False)
    for (left, right), item in zip(panels, explained, strict=True):
        left.imshow(item.pixels)
        left.set_axis_off()
        left.set_title("\n".join(f"{name}: {share:.0%}" for name, share in item.guesses), fontsize=8)
        for (kind, normalizer), line in item.ratios.groupby(["kind", "normalizer"], sort=False):
            label = f"{normalizer.upper()} {kind if kind != 'lambda' else ''}".strip()
            right.plot(
                line["layer"],
                line["mean"],
                DASHES[kind],
                marker=".",
                color=colour(normalizer),
                label=label,
                linewidth=1,
            )
        right.set(ylim=(0, 1), ylabel="ratio")
        right.set_title(item.name, fontsize=8, loc="left")
        right.tick_params(axis="x", labelbottom=item is explained[-1], rotation=90, labelsize=7)
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
