"""Copy a model to the meta device, where a forward costs no arithmetic. Surgery analyses the copy beforehand."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks; for a module of a copy, whether the original has hooks."""
    return any(getattr(module, name) for name in HOOKS) or getattr(module, "was_hooked", False)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, without values and forward hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _meta(t) for t in tensors}
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        module.__dict__["was_hooked"] = is_hooked(module)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return clone


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def example_input(model: nn.Module) -> Tensor:
    """Return an input of the size that the model was made for, or one that fits its first layer."""
    config = getattr(model, "pretrained_cfg", None) or {}
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            spatial = (64,) * (module.weight.ndim - 2)
            if len(spatial) == 2 and "input_size" in config:
                spatial = tuple(config["input_size"][1:])
            return torch.zeros(2, module.in_channels, *spatial, device="meta", dtype=module.weight.dtype)
        if isinstance(module, nn.Linear):
            return torch.zeros(2, module.in_features, device="meta", dtype=module.weight.dtype)
    raise ValueError("the model has no convolution or linear layer that shows the input's shape")


def run(forward: Callable[..., Any], *args: Any) -> Any:
    """Run a forward on the meta device, without gradients. The random number generators keep their states."""
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return forward(*args)
    finally:
        random.setstate(state)
