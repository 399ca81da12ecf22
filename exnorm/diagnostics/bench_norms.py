"""`exnorm bench norms`: one layer with its ReLU, forward and backward, against torch's batch normalization."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.diagnostics.bench import TABLES, append, bench_device, interleaved, print_rows, ratios, saved_bytes
from exnorm.norms import Norm, reference
from exnorm.surgery import norm_class

# The four shapes of ResNet-50 at 224 pixels, and two of its shapes at 32 pixels.
SHAPES = ("16x64x112x112", "16x256x56x56", "16x512x28x28", "16x2048x7x7", "32x256x8x8", "32x512x4x4")
BASELINE = "torch bn"
SECONDS_PER_ROUND = 0.02  # a small layer is repeated until a measurement takes this long
Shape = tuple[int, ...]


def parse_shape(text: str) -> Shape:
    """Return `16x64x112x112` as four integers.

    Raises:
        UserError: the text is not four positive integers.
    """
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"shape {text!r} is not possible; allowed: samples x channels x height x width, such as 16x64x112x112"
        )
    return tuple(int(part) for part in parts)


def run(
    norms: Sequence[str], shapes: Sequence[str], backends: Sequence[str], rounds: int, folder: Path = TABLES
) -> None:
    """Measure, print a table and append it to `norms.csv`."""
    device = bench_device()
    for name in norms:
        norm_class(name)
    for text, shape in {text: parse_shape(text) for text in shapes}.items():
        rows = measure(shape, norms, backends, rounds, device)
        print_rows(f"{text}, with ReLU, forward and backward", rows)
        append(folder / "norms.csv", [{"shape": text, **row} for row in rows], device=device)


def measure(
    shape: Shape, norms: Sequence[str], backends: Sequence[str], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each layer: milliseconds, the ratio to torch's BN in the same round, and saved memory in MiB."""
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)
    before = ops.get_backend()
    layers = {**_torch_layers(shape[1], device), **_naive_layers(shape[1], device)}
    try:
        for backend in backends:
            for name in norms:
                layer = norm_class(name)(shape[1], act="relu", device=device)
                layers[f"{name} {backend}"] = partial(_on_backend, ops.set_backend(backend), layer)
        steps = {name: partial(_step, layer, x, grad) for name, layer in layers.items()}
        steps[BASELINE]()
        start = time.perf_counter()
        steps[BASELINE]()
        repeats = max(1, math.ceil(SECONDS_PER_ROUND / (time.perf_counter() - start)))
        seconds = interleaved({name: partial(_repeat, step, repeats) for name, step in steps.items()}, rounds)
        return [
            {
                "layer": name,
                "rounds": rounds,
                "ms": round(sorted(values)[rounds // 2] / repeats * 1e3, 3),
                **ratios(values, seconds[BASELINE]),
                "saved_mib": round(saved_bytes(partial(layers[name], x)) / 2**20, 3),
            }
            for name, values in seconds.items()
        ]
    finally:
        ops.set_backend(before)


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    x.grad = None
    layer(x).backward(grad)


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _on_backend(backend: str, layer: Norm, x: Tensor) -> Tensor:
    ops.set_backend(backend)
    return layer(x)


def _torch_layers(channels: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    layers = {
        BASELINE: nn.BatchNorm2d(channels),
        "torch gn": nn.GroupNorm(32, channels),
        "torch in": nn.InstanceNorm2d(channels, affine=True),
    }
    return {name: nn.Sequential(layer, nn.ReLU(inplace=True)).to(device) for name, layer in layers.items()}


def _naive_layers(channels: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    formulas = {"en": reference.exemplar_norm, "sn": reference.switch_norm}
    return {
        f"naive {name}": partial(_naive, norm_class(name)(channels, device=device), f) for name, f in formulas.items()
    }


def _naive(norm: Any, formula: Callable[..., Tensor], x: Tensor) -> Tensor:
    return formula(x, dict(norm.named_parameters()), norm.eps, norm.normalizers).relu_()
