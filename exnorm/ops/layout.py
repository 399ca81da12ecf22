"""The layout of samples, channels and positions in a tensor.

Legend: N batch, C channels, L positions. `channel_dim` is 1 for (N, C, *spatial) and -1 for (N, *spatial, C).
"""

import math

import torch
from torch import Tensor


def spatial_dims(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """The dimensions over which a moment is taken: all but the batch and the channels."""
    return tuple(range(2, x.ndim)) if channel_dim == 1 else tuple(range(1, x.ndim - 1))


def length(x: Tensor, channel_dim: int) -> int:
    """L, the number of positions of one (sample, channel); 1 for a 2-D input."""
    return math.prod([x.shape[dim] for dim in spatial_dims(x, channel_dim)])


def expand_coefficients(coefficient_NC: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """An (N, C) tensor as a view that broadcasts against `x`."""
    ones = (1,) * (x.ndim - 2)
    samples, channels = coefficient_NC.shape
    shape = (samples, channels, *ones) if channel_dim == 1 else (samples, *ones, channels)
    return coefficient_NC.reshape(shape)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of moments and coefficients: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in a dtype. If it has it already, no operation runs: torch.compile (2.11) makes its gradient zero."""
    return x if x.dtype == dtype else x.to(dtype)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense(x: Tensor, channel_dim: int) -> Tensor:
    """Return `x` if it is contiguous or (with channel_dim 1) channels last in memory, else a contiguous copy."""
    if x.is_contiguous():
        return x
    if channel_dim == 1 and x.ndim > 2:
        last = _CHANNELS_LAST.get(x.ndim)  # this check takes a third of the time of a view
        if x.is_contiguous(memory_format=last) if last is not None else x.movedim(1, -1).is_contiguous():
            return x
    return x.contiguous()


def like(other: Tensor, x: Tensor) -> Tensor:
    """Return `other` in the layout and dtype of `x`, a dense tensor of the same shape."""
    if other.dtype == x.dtype and other.stride() == x.stride():
        return other
    return torch.empty_like(x).copy_(other)
