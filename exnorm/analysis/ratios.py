"""The ratios of every layer that mixes normalizers, measured on a probe batch.

Hooks compute the ratios, and no layer stores them: a tensor stored on a module would break deepcopy, EMA and
`torch.compile`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exnorm.norms import Norm


class LayerRatio(NamedTuple):
    """The share of one normalizer in one layer: mean and deviation over samples (EN) or channel groups (group SN)."""

    layer: str
    ratio: str  # "lambda" for EN; "mean", "var" for SN
    normalizer: str
    mean: float
    std: float | None


def mixing_layers(model: nn.Module) -> dict[str, Norm]:
    """Return the layers with ratios, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Norm) and hasattr(module, "ratios")
    }


def measure_ratios(model: nn.Module, images: Tensor) -> list[LayerRatio]:
    """Return the ratios of every mixing layer on a batch of images, in evaluation mode. The mode is restored."""
    layers = mixing_layers(model)
    rows = []
    for layer, ratios in read_ratios(model, images).items():
        names: Any = layers[layer].normalizers
        for ratio, value in ratios.items():
            several = value.ndim == 2
            mean_K = value.mean(0) if several else value
            std_K = value.std(0, correction=0) if several else None
            for k, normalizer in enumerate(names):
                std = None if std_K is None else float(std_K[k])
                rows.append(LayerRatio(layer, ratio, normalizer, float(mean_K[k]), std))
    return rows


@torch.no_grad()
def read_ratios(model: nn.Module, images: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every mixing layer's `ratios` on a batch, in evaluation mode. The mode is restored."""
    layers = mixing_layers(model)
    captured: dict[str, dict[str, Tensor]] = {}
    if layers:
        was_training = model.training
        with _capture(layers, captured):
            model.eval()(images)
        model.train(was_training)
    return captured


@contextmanager
def _capture(layers: dict[str, Norm], captured: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def read(module: Any, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                captured[name] = module.ratios(module.moments(args[0]))

        return read

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_metrics(rows: list[LayerRatio]) -> dict[str, float]:
    """Return rows as metrics `ratio/<layer>/<normalizer>`.

    SN's have `mean/` or `var/` before the normalizer. The names of deviations end in `/std`.
    """
    metrics: dict[str, float] = {}
    for row in rows:
        kind = "" if row.ratio == "lambda" else f"{row.ratio}/"
        key = f"ratio/{row.layer}/{kind}{row.normalizer}"
        metrics[key] = row.mean
        if row.std is not None:
            metrics[f"{key}/std"] = row.std
    return metrics


def mean_ratios(rows: list[LayerRatio]) -> dict[str, float]:
    """Return each normalizer's mean share over layers (and over SN's two sets of ratios)."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row.normalizer, []).append(row.mean)
    return {normalizer: sum(values) / len(values) for normalizer, values in shares.items()}
