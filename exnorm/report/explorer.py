"""The explorer of ratios in a page: the bars of all layers at one epoch, and the curves of the layers one selects.

`explorer.html` has its style and its script. The data are in the page as JSON, in units of 1e-4: for each layer and
epoch a row with the ratios of the normalizers, followed by their standard deviations where they are known, or null.
"""

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from exnorm.config.study import Study
from exnorm.report.palette import colour
from exnorm.report.study_figures import called, class_data, layer_data
from exnorm.runs.folder import RunFolder
from exnorm.runs.layer_ratios import read_all_class_ratios

EXPLORER = Path(__file__).with_name("explorer.html")
DATA = "DATA"  # what stands in `explorer.html` for the data
DIGITS = 4  # of a ratio, after the point
NAMES = {"lambda": "all images", "mean": "ratios of the mean", "var": "ratios of the variance"}
Packed = list[int | None]  # ratios, then deviations


@dataclass(frozen=True)
class RatioSet:
    """Ratios that are shown together."""

    cell: str  # the cell of a study, with its seed; empty for a single run
    name: str  # what is selected: all images, ratios of the mean, ...
    frame: pd.DataFrame  # epoch, layer, normalizer, mean, std; also class, if they are by class


def explorer_of_run(folder: RunFolder, config: dict[str, Any], ratios: pd.DataFrame) -> str:
    """Return the explorer of a run's ratios, also of those by class that were measured of it.

    Args:
        config: the run's configuration.
        ratios: those in its metrics (`exnorm.runs.layer_ratios.shares`).
    """
    by_class = read_all_class_ratios(folder).items()
    sets = [*_by_kind("", ratios), *(RatioSet("", f"by class, {name}", frame) for name, frame in by_class)]
    return explorer(sets, in_epochs=config["trainer"].get("validate_every") is None)


def sets_of_study(study: Study, results: Path) -> list[RatioSet]:
    """Return the ratios in the record of a study, of the first seed of each cell that has them."""
    found = []
    for cell in study.cells:
        named = f"{called(study, dict(cell.key))}, seed 0"
        if cell in study.followed:
            found += _by_kind(named, layer_data(study, cell, results))
        if cell in study.by_class:
            found.append(RatioSet(named, "by class", class_data(study, cell, results)))
    return [item for item in found if not item.frame.empty]


def explorer(sets: Sequence[RatioSet], *, in_epochs: bool) -> str:
    """Return the HTML of the explorer; empty if there are no ratios.

    Args:
        in_epochs: an "epoch" of the ratios is one, and not the number of a validation after some steps.
    """
    if not sets:
        return ""
    normalizers = {str(name) for item in sets for name in item.frame.normalizer.unique()}
    data = {
        "time": "epoch" if in_epochs else "validation",
        "digits": DIGITS,
        "colours": {name: colour(name) for name in sorted(normalizers)},
        "sets": [{"cell": item.cell, "name": item.name, **_packed(item.frame)} for item in sets],
    }
    # Without "<", no name of a layer or of a class can end the element that holds the data.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return EXPLORER.read_text(encoding="utf-8").replace(DATA, text)


def _by_kind(cell: str, frame: pd.DataFrame) -> list[RatioSet]:
    kinds: Any = frame.groupby("kind", sort=False)
    return [RatioSet(cell, NAMES[kind], rows) for kind, rows in kinds]


def _packed(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the names of what a frame has, and its rows by class, layer and epoch. All images are one class, ""."""
    epochs, normalizers = sorted(int(epoch) for epoch in frame.epoch.unique()), list(frame.normalizer.unique())
    layers, classes = _in_order(frame), list(frame["class"].unique()) if "class" in frame else [""]
    of_class = frame["class"] if "class" in frame else [""] * len(frame)
    place = {name: number for number, name in enumerate(normalizers)}
    spread = bool(frame["std"].notna().any())
    width = len(normalizers) * (2 if spread else 1)
    rows: dict[tuple[Hashable, ...], Packed] = {}
    for key, normalizer, mean, std in zip(
        zip(of_class, frame.layer, frame.epoch, strict=True), frame.normalizer, frame["mean"], frame["std"], strict=True
    ):
        row = rows.setdefault(key, [None for _ in range(width)])
        row[place[normalizer]] = _whole(mean)
        if spread:
            row[len(normalizers) + place[normalizer]] = _whole(std)
    return {
        "layers": layers,
        "normalizers": normalizers,
        "epochs": epochs,
        "classes": classes,
        "spread": spread,
        "rows": [[[rows.get((name, layer, epoch)) for epoch in epochs] for layer in layers] for name in classes],
    }


def _in_order(frame: pd.DataFrame) -> list[str]:
    """Return the layers in the network's order, which the epoch with the most layers has: some have only three."""
    fullest = frame.groupby("epoch").layer.nunique().idxmax()
    return list(dict.fromkeys([*frame.layer[frame.epoch == fullest], *frame.layer]))


def _whole(value: float) -> int | None:
    return round(10**DIGITS * round(value, DIGITS)) if math.isfinite(value) else None
