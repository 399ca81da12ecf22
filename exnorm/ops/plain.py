"""The streaming primitives as plain differentiable operations, for tools that do not support autograd functions.

`torch.func`, `vmap`, forward-mode derivatives, `torch.jit.trace` and the ONNX exporter built on it use these formulas
automatically. Second derivatives need them already in the forward: call `exnorm.ops.set_backend("plain")` before it.
The formulas keep several tensors of the input's size for the backward; the other back ends keep one.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from exnorm.ops.activations import ACTIVATIONS
from exnorm.ops.layout import cast, expand_coefficients, spatial_dims, statistics_dtype


def is_transformed() -> bool:
    """Whether torch traces or transforms the running code, so that an autograd function would fail or be lost."""
    if torch.compiler.is_compiling():
        return is_nested()  # torch 2.11 would lose the gradients that the autograd functions pass to each other
    return torch.jit.is_tracing() or is_nested() or forward_ad._current_level >= 0


def is_nested() -> bool:
    """Whether the running code is inside a transformation of `torch.func`; can be called under `torch.compile`."""
    active: Any = getattr(torch._C, "_are_functorch_transforms_active")  # noqa: B009  # not in torch's stubs
    return bool(active())


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    dims = spatial_dims(x, channel_dim)
    x = cast(x, statistics_dtype(x))
    if not dims:
        return x, torch.zeros_like(x)
    mean_NC = x.mean(dims)
    return mean_NC, (x - expand_coefficients(mean_NC, x, channel_dim)).square().mean(dims)


def affine(
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """See `exnorm.ops.eager.affine`."""
    mean, scale, shift = (expand_coefficients(c, x, channel_dim) for c in (mean_NC, scale_NC, shift_NC))
    y = (cast(x, mean_NC.dtype) - mean) * scale + shift
    if residual is not None:
        y = y + residual
    return cast(y if act is None else ACTIVATIONS[act].module()(y), x.dtype)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward: differentiating its results again raises an error that says what to do instead."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        several = results if isinstance(results, tuple) else (results,)
        marked = [t if t is None else _Refuse.apply(t.detach().requires_grad_()) for t in several]
        return tuple(marked) if isinstance(results, tuple) else marked[0]

    return run


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "exnorm's layers have no second derivatives on this back end; call exnorm.ops.set_backend('plain') before "
            "the forward (slower, and with more memory)"
        )
