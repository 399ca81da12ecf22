"""The ratios of every layer that mixes normalizers, measured on a batch of images.

Hooks compute the ratios, and no layer stores them: a tensor stored on a module would break deepcopy, EMA and
`torch.compile`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.norms import Norm
from exnorm.surgery.modes import evaluating

if TYPE_CHECKING:
    import pandas as pd

OF_IMAGES = "lambda"  # the kind of EN's ratios, which each image has for itself
COLUMNS: Any = {"layer": str, "kind": str, "normalizer": str, "image": "Int64", "group": "Int64", "ratio": float}


class LayerRatio(NamedTuple):
    """The share of one normalizer in one layer: mean and deviation over samples (EN) or channel groups (group SN)."""

    layer: str
    ratio: str  # OF_IMAGES for EN; "mean", "var" for SN
    normalizer: str
    mean: float
    std: float | None


def mixing_layers(model: nn.Module) -> dict[str, Norm]:
    """Return the layers with ratios, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Norm) and hasattr(module, "ratios")
    }


def ratios(model: nn.Module, images: Tensor) -> "pd.DataFrame":
    """Return the ratios of every layer that mixes normalizers on a batch of images, in evaluation mode.

    The model is called once, and is in its earlier mode afterwards. A layer that is called several times has the ratios
    of its last call.

    Args:
        model: a converted model, or one that contains converted models.
        images: a batch as the model takes it: (N, 3, H, W), normalized, on the model's device.

    Returns:
        A row for each ratio, with the columns `layer` (its name in the model), `kind` (`lambda` for EN; `mean` and
        `var` for SN), `normalizer`, `image` (the index in the batch, of EN's ratios), `group` (the channel group, of
        SN's ratios with several groups) and `ratio`. The ratios of one layer, kind, image and group sum to 1.

    Raises:
        UserError: no layer of the model mixes normalizers.
    """
    import pandas as pd  # here, because a training imports this module and needs no pandas

    if not mixing_layers(model):
        raise UserError("no layer of this model mixes normalizers. Convert it first: exnorm.convert(model, 'en')")
    rows = []
    for layer, kind, names, value in _named_values(model, images):
        for index, shares in enumerate(value.tolist()) if value.ndim == 2 else [(None, value.tolist())]:
            place = (index, None) if kind == OF_IMAGES else (None, index)
            rows += [(layer, kind, name, *place, share) for name, share in zip(names, shares, strict=True)]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def measure_ratios(model: nn.Module, images: Tensor) -> list[LayerRatio]:
    """Return mean and deviation of the ratios of every mixing layer on a batch, as `ratios` measures them."""
    rows = []
    for layer, kind, names, value in _named_values(model, images):
        several = value.ndim == 2
        mean_K = value.mean(0) if several else value
        std_K = value.std(0, correction=0) if several else None
        for k, normalizer in enumerate(names):
            std = None if std_K is None else float(std_K[k])
            rows.append(LayerRatio(layer, kind, normalizer, float(mean_K[k]), std))
    return rows


def _named_values(model: nn.Module, images: Tensor) -> Iterator[tuple[str, str, Sequence[str], Tensor]]:
    """Yield layer, kind, the normalizers, and the ratios: (K,), or (N, K) of images or channel groups."""
    layers: Any = mixing_layers(model)
    for layer, kinds in read_ratios(model, images).items():
        for kind, value in kinds.items():
            yield layer, kind, layers[layer].normalizers, value


@torch.no_grad()
def read_ratios(model: nn.Module, images: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every mixing layer's `ratios` on a batch, in evaluation mode."""
    layers = mixing_layers(model)
    captured: dict[str, dict[str, Tensor]] = {}
    if layers:
        with evaluating(model), _capture(layers, captured):
            model(images)
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
        kind = "" if row.ratio == OF_IMAGES else f"{row.ratio}/"
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
