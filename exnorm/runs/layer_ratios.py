"""Read the ratios of a run's layers, from its metrics and from files of ratios by class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from exnorm.config.errors import UserError
from exnorm.runs.folder import RunFolder


def shares(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the ratios in a run's metrics: epoch, layer, kind (lambda, mean, var), normalizer, mean and std.

    The mean and std are over samples. Layers are in the order of the network.
    """
    found: dict[tuple[int, str, str, str], dict[str, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("ratio/") and value is not None:
                _, *words = key.split("/")
                statistic = words.pop() if words[-1] == "std" else "mean"
                normalizer = words.pop()
                kind = words.pop() if len(words) > 1 and words[-1] in ("mean", "var") else "lambda"
                layer = "/".join(words)  # the name of a module can have a slash
                found.setdefault((row["epoch"], layer, kind, normalizer), {})[statistic] = value
    keys = pd.DataFrame(found.keys(), columns=["epoch", "layer", "kind", "normalizer"])
    return keys.join(pd.DataFrame(found.values(), columns=["mean", "std"]))


LARGE_KL = 0.1  # nats; SN's paper does not say what is large, so we chose this before any measurement
CLASS_COLUMNS: Any = {  # of the ratios by class, with their types
    "data": str,
    "epoch": int,
    "layer": str,
    "class": str,
    "normalizer": str,
    "images": int,
    "mean": float,
    "std": float,
}
LABEL_COLUMNS: Any = {"layer": str, "images": int, "auc": float, "low": float, "high": float}
LOSS = "loss"  # in the column `layer`: the loss on the given label instead of ratios


def bottom_middle_top(layers: Sequence[str]) -> list[str]:
    """Return the first, middle and last layer, which are followed over the epochs."""
    return list(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))) if layers else []


def read_class_ratios(file: Path) -> pd.DataFrame:
    """Return what `exnorm ratios --by-class` measured: data, epoch, layer, class, normalizer, images, mean, std."""
    return _read(file, CLASS_COLUMNS)


def read_all_class_ratios(folder: RunFolder) -> dict[str, pd.DataFrame]:
    """Return all that `exnorm ratios --by-class` measured of a run, by the name of the data set.

    Files of the same validation set, with other classes or of other checkpoints, are one table. Two sets of the same
    name are told apart by the hash of their evaluation.
    """
    parts: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for file, evaluation in folder.class_ratios_files():
        frame = read_class_ratios(file)
        parts.setdefault((str(frame["data"].iloc[0]), evaluation), []).append(frame)
    names = [name for name, _ in parts]
    keys = ["epoch", "layer", "class", "normalizer"]
    return {
        name if names.count(name) == 1 else f"{name} ({evaluation})": pd.concat(frames).drop_duplicates(keys)
        for (name, evaluation), frames in parts.items()
    }


def read_label_ratios(file: Path) -> pd.DataFrame:
    """Return what `exnorm ratios --wrong-labels` measured: layer, images, auc, low, high."""
    return _read(file, LABEL_COLUMNS)


def _read(file: Path, columns: Any) -> pd.DataFrame:
    try:
        frame = pd.read_csv(file, dtype=columns, keep_default_na=False)
    except ValueError as problem:  # pandas' parsing errors are also ValueErrors
        raise UserError(f"{file} is damaged ({problem}). Remove it; it will be measured again") from None
    if list(frame) != list(columns) or frame.empty:
        raise UserError(f"{file} is damaged. Remove it; it will be measured again")
    return frame


def symmetric_kl(p: Any, q: Any) -> pd.Series:
    """Return the symmetric KL divergence in each row of two tables, in nats: sum_k (p_k - q_k) log(p_k / q_k).

    It is KL(p, q) + KL(q, p), and infinite where only one of the two ratios is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(p == q, 0.0, (p - q) * (np.log(p) - np.log(q)))
    return pd.Series(parts.sum(1), index=p.index)
