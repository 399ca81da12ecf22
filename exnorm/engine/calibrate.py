"""Batch average: BN's statistics at test time from batches of training images, instead of the moving average.

    mean = avg_b mean_b,   var = avg_b (var_b + mean_b^2) - mean^2 = avg_b var_b + avg_b (mean_b - mean)^2

over batches of BN's scope, centre-cropped, in training mode without gradients. This is the rule of SN's released code,
which uses 200 batches. Source: P. Luo et al., "Switchable Normalization", TPAMI 2019, and its code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.data.loader import Loader, SeededImages, fixed_batches, mixed_seed
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import autocast
from exnorm.norms.batch_scope import BatchScopeNorm, batch_scope_norms, take_pending

Calibrated = dict[str, Tensor]  # running_mean and running_var by their names in the state dict


@torch.no_grad()
def batch_average(
    model: nn.Module,
    dataset: SeededImages,
    *,
    scope: int,
    batches: int,
    workers: int,
    precision: str,
    world: World,
) -> Calibrated:
    """Return each layer's BN statistics over `batches` batches of `scope` images; the model is not changed.

    Each worker takes every world.size-th batch; all workers return the same numbers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchScopeNorm)}
    layers = {name: module for name, module in layers.items() if module.running_mean is not None}
    totals = {name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
    loader = Loader(dataset, _batches(dataset, scope, batches, world), workers=workers, device=world.device)
    count = torch.zeros(1, dtype=torch.float64)
    with _scope_on_this_device(model):
        for images, *_ in loader:
            with autocast(world.device, precision):
                model(images)
            count += 1
            for name, layer in layers.items():
                mean_C, var_C = (statistic.double().cpu() for statistic in take_pending(layer))
                totals[name] += torch.stack((mean_C, var_C, mean_C.square()))
    count = world.sum_(count)
    calibrated: Calibrated = {}
    for name, layer in layers.items():
        mean_C, var_C, square_C = world.sum_(totals[name]) / count
        assert layer.running_mean is not None and layer.running_var is not None
        calibrated[f"{name}.running_mean"] = mean_C.to(layer.running_mean)
        calibrated[f"{name}.running_var"] = (var_C + (square_C - mean_C.square()).clamp(min=0)).to(layer.running_var)
    return calibrated


def _batches(dataset: SeededImages, scope: int, batches: int, world: World) -> list[Any]:
    order = torch.randperm(
        len(dataset),
        generator=torch.Generator().manual_seed(mixed_seed(dataset.seed, -1)),
    ).tolist()
    whole = [batch for batch in fixed_batches(order, scope) if len(batch) == scope][:batches]
    if not whole:
        raise UserError(f"batch_average needs a batch of {scope} training images, but there are only {len(dataset)}")
    return whole[world.rank :: world.size]


@contextmanager
def _scope_on_this_device(model: nn.Module) -> Iterator[None]:
    """Set training mode with one replica per forward and pending statistics; restore everything afterwards."""
    modules = batch_scope_norms(model)
    before = [(module.replicas, module.group, module.deferred) for module in modules]
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout stays off
    for module in modules:
        module.training = True
        module.replicas, module.group, module.deferred = 1, None, True
    try:
        yield
    finally:
        for module, (replicas, group, deferred) in zip(modules, before, strict=True):
            module.replicas, module.group, module.deferred = replicas, group, deferred
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def using(model: nn.Module, calibrated: Calibrated) -> Iterator[None]:
    """Give the model other running statistics inside the block."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in calibrated}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        buffer.copy_(calibrated[name])
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
