"""The streaming primitives as custom operators (`torch.library`), which `torch.compile` does not trace into.

If the compiler traces a formula, it decides what to save for backward. It saves x - mean in float32, two to four times
the bytes of x. Of an operator it knows only the inputs and outputs, so it saves x itself, once. At run time, an
operator calls the current back end. Legend: see `exnorm.ops.eager`.
"""

import torch
from torch import Tensor

from exnorm.ops import backend
from exnorm.ops.layout import dense, statistics_dtype


def _coefficients(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Two (N, C) tensors in the moments' dtype, contiguous."""
    shape = (x.shape[0], x.shape[channel_dim])
    return x.new_empty(shape, dtype=statistics_dtype(x)), x.new_empty(shape, dtype=statistics_dtype(x))


@torch.library.custom_op("exnorm::moments", mutates_args=())
def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    mean_NC, var_NC = backend.running().moments(x, channel_dim)
    return mean_NC.contiguous(), var_NC.contiguous()


@moments.register_fake
def _(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    return _coefficients(x, channel_dim)


@torch.library.custom_op("exnorm::affine", mutates_args=())
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
    return backend.running().affine(x, mean_NC, scale_NC, shift_NC, residual, channel_dim, act)


@affine.register_fake
def _(
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    return torch.empty_like(dense(x, channel_dim))


@torch.library.custom_op("exnorm::affine_sums", mutates_args=())
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
    dscale_NC, dshift_NC = backend.running().affine_sums(grad, x, mean_NC, scale_NC, shift_NC, channel_dim, act)
    return dscale_NC.contiguous(), dshift_NC.contiguous()


@affine_sums.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    return _coefficients(x, channel_dim)


@torch.library.custom_op("exnorm::gated_sums", mutates_args=())
def gated_sums(
    grad: Tensor, x: Tensor, y: Tensor, mean_NC: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `exnorm.ops.eager.gated_sums`."""
    sums = backend.running().gated_sums(grad, x, y, mean_NC, scale_NC, shift_NC, channel_dim)
    dscale_NC, dshift_NC, gated = sums
    return dscale_NC.contiguous(), dshift_NC.contiguous(), gated


@gated_sums.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor, mean_NC: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return *_coefficients(x, channel_dim), torch.empty_like(dense(x, channel_dim))


@torch.library.custom_op("exnorm::input_gradient", mutates_args=())
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
    return backend.running().input_gradient(grad, x, mean_NC, scale_NC, shift_NC, slope_NC, offset_NC, channel_dim, act)


@input_gradient.register_fake
def _(
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
    return torch.empty_like(dense(x, channel_dim))
