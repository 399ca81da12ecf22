"""`exnorm ratios RUN_DIR`: what the layers of a run chose, from its `metrics.jsonl`."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from exnorm.config.errors import UserError
from exnorm.report.ratio_figures import dynamics, stacked
from exnorm.runs.folder import RunFolder
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.table import print_table

KINDS = {"lambda": "", "mean": "mean ", "var": "var "}
LARGE_BN = 0.3  # above it the authors of SN advise batch averages (Luo et al., TPAMI 2019, Table XI)


def run(run_path: Path) -> None:
    """Print the ratios of every layer after the last epoch, write the figures, and give the authors' advice."""
    folder = RunFolder(run_path)
    config = folder.read_config()
    frame = shares(MetricsLog.read(folder.metrics_file))
    if frame.empty:
        raise UserError(
            f"{run_path} has no ratios: norm={config['norm']['name']} mixes nothing, or no epoch has ended, or "
            "logger.probe_images was 0"
        )
    print_layers(per_layer(frame))
    for line in advice(frame, run_path):
        print(line)
    title = f"{config['model']['name']}, {config['norm']['name']}, {config['data']['name']}, batch {config['batch']}"
    for name, figure in {"ratios": stacked(frame, title), "ratio_dynamics": dynamics(frame, title)}.items():
        for suffix in ("svg", "png"):
            path = folder.path / "figures" / f"{name}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            print(f"figure: {path}")


def shares(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The ratios in a run's metrics: epoch, layer, kind (lambda, mean, var), normalizer, mean and std over samples.

    Layers are in the order of the network.
    """
    found: dict[tuple[int, str, str, str], dict[str, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("ratio/") and value is not None:
                _, layer, *words = key.split("/")
                statistic = words.pop() if words[-1] == "std" else "mean"
                kind = words[0] if len(words) == 2 else "lambda"
                found.setdefault((row["epoch"], layer, kind, words[-1]), {})[statistic] = value
    keys = pd.DataFrame(found.keys(), columns=["epoch", "layer", "kind", "normalizer"])
    return keys.join(pd.DataFrame(found.values(), columns=["mean", "std"]))


def per_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each layer after the last epoch: its ratios, and the divergence of SN's two sets of them.

    The divergence is the symmetric one of Kullback and Leibler, sum_k (w_k - w'_k) log(w_k / w'_k); infinite where one
    of them is 0 and the other is not.
    """
    last = frame.query("epoch == epoch.max()")
    wide = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="mean", sort=False)
    if {"mean", "var"} <= set(last.kind):
        with np.errstate(divide="ignore", invalid="ignore"):
            p, q = wide["mean"], wide["var"]
            parts = np.where(p == q, 0.0, (p - q) * (np.log(p) - np.log(q)))
        wide[("symmetric KL", "")] = parts.sum(1)
    spread = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="std", sort=False)
    for kind, normalizer in spread.columns:
        wide[("std", normalizer)] = spread[kind, normalizer]
    return wide


def advice(frame: pd.DataFrame, run_path: Path) -> list[str]:
    """What the authors of SN advise for these ratios."""
    last = frame.query("epoch == epoch.max() and normalizer == 'bn'")
    if last.empty:
        return []
    ratio = float(last["mean"].to_numpy().mean())
    if ratio > LARGE_BN:
        return [
            f"BN's mean ratio is {ratio:.2f}, above {LARGE_BN}: SN's authors advise to evaluate with batch averages, "
            f"exnorm eval {run_path} inference=batch_average"
        ]
    return [f"BN's mean ratio is {ratio:.2f}; up to {LARGE_BN} SN's authors find the moving average good enough"]


def print_layers(wide: pd.DataFrame) -> None:
    """The table on the terminal."""
    heads = [f"{KINDS.get(kind, f'{kind} ')}{normalizer}".strip() for kind, normalizer in wide.columns]
    table = Table("layer", *heads, box=None, pad_edge=False)
    for layer, values in zip(wide.index, wide.to_numpy(), strict=True):
        table.add_row(str(layer), *(f"{value:.3f}" for value in values))
    print_table(table)
