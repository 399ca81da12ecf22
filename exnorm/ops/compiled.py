"""The streaming primitives compiled: our C++ on the CPU, what inductor makes of the eager formulas elsewhere.

Each runs on a three-dimensional view, (N, C, L) or (N, L, C), so that one compiled function serves any number of
dimensions and both memory formats. A tensor in neither format is copied into one. Legend: see `exnorm.ops.eager`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exnorm.ops import eager, native
from exnorm.ops.layout import statistics_dtype
from exnorm.ops.pieces import Piece


def flatten(x: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """A tensor as (N, C, L) with channel_dim 1, or (N, L, C) with -1: a contiguous view, or a copy if there is none."""
    if channel_dim == 1 and x.ndim > 2 and not x.is_contiguous():
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return last.view(x.shape[0], -1, x.shape[1]), -1
    x = x.contiguous()
    shape = (x.shape[0], x.shape[1], -1) if channel_dim == 1 else (x.shape[0], -1, x.shape[-1])
    return x.view(shape), channel_dim


def flatten_like(grad: Tensor, channel_dim: int, flat: Tensor, flat_dim: int) -> Tensor:
    """A gradient in the layout and dtype of the flattened input."""
    if channel_dim == 1 and flat_dim == -1:
        grad = grad.movedim(1, -1)
    return grad.to(flat.dtype).contiguous().view(flat.shape)


def empty_output(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """A tensor for a result in the shape and memory format of `x`, and its flat view."""
    y = torch.empty_like(x)
    if flatten(y, channel_dim)[0].data_ptr() != y.data_ptr():
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, flatten(y, channel_dim)[0]


def _plain(*coefficients: Tensor) -> list[Tensor]:
    """Coefficients as the compiled code takes them: contiguous, and outside of any graph."""
    return [coefficient.detach().contiguous() for coefficient in coefficients]


@functools.cache
def _piece(primitive: Callable[..., Any], channel_dim: int, *act: str | None) -> Piece:
    """A primitive that returns (N, C) tensors."""

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return primitive(*args, channel_dim, *act)

    return Piece(run)


@functools.cache
def _writing_piece(primitive: Callable[..., Tensor], channel_dim: int, act: str | None) -> Piece:
    """A primitive whose result is written into its first argument."""

    def run(y: Tensor, *args: Tensor | None) -> None:
        y.copy_(primitive(*args, channel_dim, act))

    return Piece(run)


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    flat, dim = flatten(x, channel_dim)
    if not native.runs(flat, None):
        return _piece(eager.moments, dim)(flat)
    shape = (x.shape[0], x.shape[channel_dim])
    dtype = statistics_dtype(x)
    results = [torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)]
    native.call(native.MOMENTS, flat, dim, None, out=results)
    return results[0], results[1]


def affine(x: Tensor, mean_NC: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int, act: str | None) -> Tensor:
    """See `exnorm.ops.eager.affine`."""
    flat, dim = flatten(x, channel_dim)
    y, flat_y = empty_output(x, channel_dim)
    coefficients = _plain(mean_NC, scale_NC, shift_NC)
    if native.runs(flat, act):
        native.call(native.AFFINE, flat, dim, act, coefficients=coefficients, out=[flat_y])
    else:
        _writing_piece(eager.affine, dim, act)(flat_y, flat, *coefficients)
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
    flat, dim = flatten(x, channel_dim)
    grad = flatten_like(grad, channel_dim, flat, dim)
    coefficients = _plain(mean_NC, scale_NC, shift_NC)
    if not native.runs(flat, act):
        return _piece(eager.affine_sums, dim, act)(grad, flat, *coefficients)
    results = [torch.empty_like(coefficients[0]), torch.empty_like(coefficients[0])]
    native.call(native.SUMS, flat, dim, act, grad=grad, coefficients=coefficients, out=results)
    return results[0], results[1]


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
    flat, dim = flatten(x, channel_dim)
    grad = flatten_like(grad, channel_dim, flat, dim)
    dx, flat_dx = empty_output(x, channel_dim)
    coefficients = _plain(mean_NC, scale_NC, shift_NC)
    if slope_NC is None or offset_NC is None:
        zero_NC = torch.zeros_like(mean_NC, memory_format=torch.contiguous_format)
        coefficients += [zero_NC, zero_NC]
    else:
        coefficients += _plain(slope_NC, offset_NC)
    if native.runs(flat, act):
        native.call(native.GRADIENT, flat, dim, act, grad=grad, coefficients=coefficients, out=[flat_dx])
    else:
        _writing_piece(eager.input_gradient, dim, act)(flat_dx, grad, flat, *coefficients)
    return dx
