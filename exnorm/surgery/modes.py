"""Freeze, recalibrate and synchronize exnorm's layers, like functions of torch and timm for batch normalization."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exnorm.config.errors import UserError
from exnorm.norms import BatchScopeNorm, Norm
from exnorm.norms.batch_scope import batch_scope_norms, world_group


def freeze(model: nn.Module) -> nn.Module:
    """Freeze every layer of exnorm: do not learn its parameters, and use its running statistics without updates.

    `model.train()` does not undo this. Layers of torch do not change. The model is changed in place and returned.
    """
    for module in model.modules():
        if isinstance(module, Norm):
            module.frozen = True
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model


def convert_sync(model: nn.Module) -> nn.Module:
    """Make every layer of exnorm normalize over the batches of all processes, weighted by their sizes.

    Layers of torch do not change; `nn.SyncBatchNorm.convert_sync_batchnorm` converts those. The model is changed in
    place and returned.
    """
    for module in batch_scope_norms(model):
        module.sync = True
        module.replicas, module.group = 1, world_group()
    return model


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any], *, device: Any = None) -> nn.Module:
    """Replace the running statistics by their mean over the batches of a loader, for exnorm's and torch's layers.

    It works like `torch.optim.swa_utils.update_bn`, but all other layers stay in evaluation mode, so dropout is off.
    Frozen layers keep their statistics. The model is changed in place and returned, with its modes as before.

    Args:
        loader: yields batches, or tuples whose first element is a batch.
        device: the device to which the batches are moved; None to leave them where they are.

    Raises:
        ValueError: no layer has running statistics that are not frozen, or the loader has no batches. The statistics
            stay as they were.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchScopeNorm | _BatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None and not getattr(layer, "frozen", False)]
    if not layers:
        raise UserError("recalibrate found no layer with running statistics, or all such layers are frozen")
    count = 0
    with _collecting(model, layers):
        for batch in loader:
            images: Tensor = batch[0] if isinstance(batch, list | tuple) else batch
            model(images if device is None else images.to(device))
            count += 1
        if not count:
            raise UserError("recalibrate got a loader without batches; give the training images")
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while. Afterwards each module is in its earlier mode, frozen ones too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _collecting(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Put only these layers into training mode, with reset statistics and a cumulative mean.

    All modes are restored at the end. The statistics are restored on an error.
    """
    options = [{name: getattr(layer, name) for name in _COLLECTING if hasattr(layer, name)} for layer in layers]
    values = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    with evaluating(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.training = True
            for name, value in _COLLECTING.items():
                if hasattr(layer, name):
                    setattr(layer, name, value)
        try:
            yield
        except BaseException:
            for buffer, value in values:
                buffer.copy_(value)
            raise
        finally:
            for layer, before in zip(layers, options, strict=True):
                vars(layer).update(before)


_COLLECTING: dict[str, Any] = {"momentum": None, "deferred": False, "track_running_stats": True}
