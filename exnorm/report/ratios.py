"""`exnorm ratios RUN_DIR`: the ratios of the layers of a run, from its `metrics.jsonl`."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from exnorm.config.errors import UserError
from exnorm.report import class_figures, label_auc
from exnorm.report.class_variance import sentence
from exnorm.report.explorer import explorer_of_run
from exnorm.report.page import page
from exnorm.report.ratio_figures import dynamics, stacked
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.layer_ratios import shares, symmetric_kl
from exnorm.runs.metrics import MetricsLog, validated
from exnorm.runs.table import print_table

KINDS = {"lambda": "", "mean": "mean ", "var": "var "}
SPREAD = ("mean", "within", "between")
LARGE_BN = 0.3  # above it the authors of SN advise batch averages (Luo et al., TPAMI 2019, Table XI)


def run(run_path: Path) -> None:
    """Print the ratios of every layer after the last epoch, write the figures, and give the authors' advice."""
    folder = RunFolder(run_path)
    config = folder.read_config()
    log = MetricsLog.read(folder.metrics_file)
    frame = shares(log)
    if frame.empty:
        ended = bool(validated(log))
        reason = f"norm={config['norm']['name']} does not mix normalizers, or logger.probe_images was 0"
        raise UserError(f"{run_path} has no ratios: {reason if ended else 'no epoch has ended yet'}")
    print_layers(per_layer(frame))
    for line in advice(frame, run_path):
        print(line)
    title = f"{config['model']['name']}, {config['norm']['name']}, {config['data']['name']}, batch {config['batch']}"
    save_figures(folder, {"ratios": stacked(frame, title), "ratio_dynamics": dynamics(frame, title)})
    save_page(folder, config, frame)


def run_by_class(run_path: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Print how far the ratios of each layer spread over images and classes, and write the figures by class.

    Args:
        frames: the measured ratios by data set, the run's own first.
    """
    folder, figures = RunFolder(run_path), dict[str, Figure]()
    for name, frame in frames.items():
        title = f"{folder.path.name}, images of {name}"
        for kind, (data_of, draw) in class_figures.OF_ONE.items():
            data = data_of(frame)
            if not data.empty:
                figures[f"{kind}-{name}"] = draw(data, title)
        print(f"Images of {name}: mean ratio, deviation within and between {frame['class'].nunique()} classes")
        if frame.epoch.nunique() < 2:
            print("No figure over training: the run kept no snapshots. Train with trainer.snapshots=[0.1,0.5]")
        spread = class_figures.spread_data(frame)
        print_layers(spread.pivot_table(index="layer", columns="normalizer", values=list(SPREAD), sort=False), 4)
        if said := sentence(frame):
            print(said)
    own, *others = frames
    for other in others:
        data = class_figures.difference_data(frames[own], frames[other])
        data.insert(0, "pair", f"{own} minus {other}")
        figures[f"difference-{other}"] = class_figures.draw_differences(data, folder.path.name)
    save_figures(folder, figures)
    save_page(folder, folder.read_config(), shares(MetricsLog.read(folder.metrics_file)))


def run_wrong_labels(run_path: Path, frame: pd.DataFrame) -> None:
    """Print how well the ratios of each layer tell wrong labels, and write the figure."""
    folder = RunFolder(run_path)
    table = Table("layer", "AUC", "95 % interval", box=None, pad_edge=False)
    rows: Any = frame.itertuples()
    for row in rows:
        table.add_row(str(row.layer), f"{row.auc:.3f}", f"{row.low:.3f} to {row.high:.3f}")
    print_table(table)
    print(label_auc.sentence(frame))
    save_figures(folder, {"wrong_labels": label_auc.draw(frame, folder.path.name)})


def save_figures(folder: RunFolder, figures: Mapping[str, Figure]) -> None:
    """Write figures into the run folder and print their paths."""
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            path = folder.path / "figures" / f"{name}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            print(f"figure: {path}")


def save_page(folder: RunFolder, config: dict[str, Any], frame: pd.DataFrame) -> None:
    """Write the page in which one explores the ratios of a run, also those by class, and print its path."""
    path = folder.path / "figures" / "ratios.html"
    path.parent.mkdir(exist_ok=True)
    heading = f"<h1>{html.escape(folder.path.name)}</h1>"
    write_text_atomic(path, page(folder.path.name, [heading, explorer_of_run(folder, config, frame)]))
    print(f"page: {path}")


def per_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each layer after the last epoch: its ratios, and the divergence of SN's two sets of ratios."""
    last = frame.query("epoch == epoch.max()")
    wide = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="mean", sort=False)
    if {"mean", "var"} <= set(last.kind):
        wide[("symmetric KL", "")] = symmetric_kl(wide["mean"], wide["var"])
    spread = last.pivot_table(index="layer", columns=["kind", "normalizer"], values="std", sort=False)
    for kind, normalizer in spread.columns:
        wide[("std", normalizer)] = spread[kind, normalizer]
    return wide


def advice(frame: pd.DataFrame, run_path: Path) -> list[str]:
    """Return the advice of SN's authors on its ratios; nothing for EN's ratios."""
    last = frame.query("epoch == epoch.max() and normalizer == 'bn' and kind != 'lambda'")
    if last.empty:
        return []
    ratio = float(last["mean"].to_numpy().mean())
    if ratio > LARGE_BN:
        return [
            f"BN's mean ratio is {ratio:.2f}, above {LARGE_BN}: SN's authors advise batch averages. "
            f"Type exnorm eval {run_path} inference=batch_average"
        ]
    return [f"BN's mean ratio is {ratio:.2f}. Up to {LARGE_BN}, SN's authors find the moving average good enough"]


def print_layers(wide: pd.DataFrame, digits: int = 3) -> None:
    """Print the table on the terminal."""
    heads = [f"{KINDS.get(kind, f'{kind} ')}{normalizer}".strip() for kind, normalizer in wide.columns]
    table = Table("layer", *heads, box=None, pad_edge=False)
    for layer, values in zip(wide.index, wide.to_numpy(), strict=True):
        table.add_row(str(layer), *(f"{value:.{digits}f}" for value in values))
    print_table(table)
