"""The compiled streaming primitives: C++ (`native.cpp`) on the CPU, inductor's code of the eager formulas elsewhere.

Both need dense tensors (contiguous or channels last) and copy others first. Inductor's code gets a three-dimensional
view, (N, C, L) or (N, L, C). So one compiled function serves any number of dimensions and both memory formats.
Legend: see `exnorm.ops.eager`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exnorm.ops import eager, native
from exnorm.ops.activations import through_relu
from exnorm.ops.guardless import GuardlessFunction
from exnorm.ops.layout import dense, like, statistics_dtype


def _flatten(x: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """Return a dense tensor as (N, C, L) and channel_dim 1, or as (N, L, C) and -1."""
    if channel_dim == -1:
        return x.view(x.shape[0], -1, x.shape[-1]), -1
    if x.is_contiguous():
        return x.view(x.shape[0], x.shape[1], -1), 1
    return x.movedim(1, -1).view(x.shape[0], -1, x.shape[1]), -1


def _plain(*coefficients: Tensor) -> list[Tensor]:
    """Return the coefficients as the compiled functions assume them: contiguous, and detached from autograd."""
    return [coefficient.detach().contiguous() for coefficient in coefficients]


@functools.cache
def _piece(primitive: Callable[..., Any], channel_dim: int, *act: str | None) -> GuardlessFunction:
    """Return a compiled primitive that returns (N, C) tensors."""

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return primitive(*args, channel_dim, *act)

    return GuardlessFunction(primitive.__name__, run)


@functools.cache
def _writing_piece(primitive: Callable[..., Tensor], channel_dim: int, act: str | None) -> GuardlessFunction:
    """Return a compiled primitive that writes its result into its first argument."""

    def run(y: Tensor, *args: Tensor | None) -> None:
        y.copy_(primitive(*args, channel_dim, act))

    return GuardlessFunction(primitive.__name__, run)


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    x = dense(x, channel_dim)
    if not native.runs(x, None):
        flat, dim = _flatten(x, channel_dim)
        return _piece(eager.moments, dim)(flat)
    shape, dtype = (x.shape[0], x.shape[channel_dim]), statistics_dtype(x)
    mean_NC, var_NC = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    native.call(native.MOMENTS, x, channel_dim, None, (), mean_NC, var_NC)
    return mean_NC, var_NC


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
    x = dense(x, channel_dim)
    y = torch.empty_like(x)
    coefficients = (mean_NC, scale_NC, shift_NC)
    if residual is not None:
        residual = like(residual, x)
    if native.runs(x, act):
        native.call(native.AFFINE, x, channel_dim, act, coefficients, y, other=residual)
    else:
        flat, dim = _flatten(x, channel_dim)
        flat_y, flat_residual = (t if t is None else _flatten(t, channel_dim)[0] for t in (y, residual))
        _writing_piece(eager.affine, dim, act)(flat_y, flat, *_plain(*coefficients), flat_residual)
    return y


def affine_sums(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.affine_sums`."""
    x = dense(x, channel_dim)
    grad = like(grad, x)
    if not native.runs(x, act):
        flat, dim = _flatten(x, channel_dim)
        flat_grad, _ = _flatten(grad, channel_dim)
        return _piece(eager.affine_sums, dim, act)(flat_grad, flat, *_plain(mean_NC, scale_NC, shift_NC))
    dscale_NC, dshift_NC = (torch.empty(mean_NC.shape, dtype=mean_NC.dtype) for _ in range(2))
    native.call(native.SUMS, x, channel_dim, act, (mean_NC, scale_NC, shift_NC), dscale_NC, dshift_NC, other=grad)
    return dscale_NC, dshift_NC


def gated_sums(
    grad: Tensor, x: Tensor, y: Tensor, mean_NC: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `exnorm.ops.eager.gated_sums`."""
    gated = through_relu(grad, y)
    return *affine_sums(gated, x, mean_NC, scale_NC, shift_NC, channel_dim, None), gated


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    slope_NC: Tensor | None,
    offset_NC: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """See `exnorm.ops.eager.input_gradient`."""
    x = dense(x, channel_dim)
    grad, dx = like(grad, x), torch.empty_like(x)
    if slope_NC is None or offset_NC is None:
        slope_NC = offset_NC = torch.zeros_like(mean_NC, memory_format=torch.contiguous_format)
    coefficients = (mean_NC, scale_NC, shift_NC, slope_NC, offset_NC)
    if native.runs(x, act):
        native.call(native.GRADIENT, x, channel_dim, act, coefficients, dx, other=grad)
    else:
        flat, dim = _flatten(x, channel_dim)
        flat_dx, flat_grad = _flatten(dx, channel_dim)[0], _flatten(grad, channel_dim)[0]
        _writing_piece(eager.input_gradient, dim, act)(flat_dx, flat_grad, flat, *_plain(*coefficients))
    return dx
