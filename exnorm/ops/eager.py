"""The streaming primitives as plain torch operations, on any device.

Legend: N batch, C channels, L positions. Big tensors have the shape of `x`; means, coefficients and sums are (N, C)
in float32 (float64 for float64 input), whatever the dtype of `x`. All formulas use `x - mean`, so a mean far larger
than the deviation costs no precision.
"""

import torch
from torch import Tensor, addcmul

from exnorm.ops.activations import ACTIVATIONS, through_relu
from exnorm.ops.layout import cast, expand_coefficients, spatial_dims, statistics_dtype


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance over the positions of each (sample, channel); two passes, centred."""
    dims = spatial_dims(x, channel_dim)
    x = cast(x, statistics_dtype(x))
    if not dims:
        return x.clone(), x.new_zeros(x.shape)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var_NC = centred.square_().mean(dims)
    return mean.reshape(var_NC.shape), var_NC


def _centred(x: Tensor, mean_NC: Tensor, channel_dim: int) -> Tensor:
    return cast(x, mean_NC.dtype) - expand_coefficients(mean_NC, x, channel_dim)


def _preactivation(centred: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int) -> Tensor:
    scale = expand_coefficients(scale_NC, centred, channel_dim)
    return addcmul(expand_coefficients(shift_NC, centred, channel_dim), centred, scale)


def affine(
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """act(scale * (x - mean) + shift + residual) in the dtype and memory format of `x`."""
    y = _preactivation(_centred(x, mean_NC, channel_dim), scale_NC, shift_NC, channel_dim)
    if residual is not None:
        y = y.add(residual) if torch.compiler.is_compiling() else y.add_(residual)
    if act is not None:
        y = ACTIVATIONS[act].apply_(y)
    return cast(y, x.dtype)


def _through_activation(
    grad: Tensor, centred: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int, act: str | None
) -> Tensor:
    """The gradient at scale * (x - mean) + shift, in the coefficients' dtype."""
    grad = cast(grad, scale_NC.dtype)
    if act is None:
        return grad
    return ACTIVATIONS[act].backward(_preactivation(centred, scale_NC, shift_NC, channel_dim), grad)


def affine_sums(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """sum_L g * (x - mean) and sum_L g, the gradients of scale and shift; g: the gradient at the activation's input."""
    centred = _centred(x, mean_NC, channel_dim)
    grad = _through_activation(grad, centred, scale_NC, shift_NC, channel_dim, act)
    dims = spatial_dims(x, channel_dim)
    product = grad * centred
    if not dims:
        return product, grad.clone()  # a custom operator must not return an alias
    return product.sum(dims), grad.sum(dims)


def gated_sums(
    grad: Tensor, x: Tensor, y: Tensor, mean_NC: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`affine_sums` where a residual and a ReLU with the output `y` follow, and the gradient at the ReLU's input."""
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
    """scale * g + slope * (x - mean) + offset; without slope and offset, scale * g."""
    centred = _centred(x, mean_NC, channel_dim)
    grad = _through_activation(grad, centred, scale_NC, shift_NC, channel_dim, act)
    scale = expand_coefficients(scale_NC, x, channel_dim)
    if slope_NC is None or offset_NC is None:
        return cast(grad * scale, x.dtype)
    return cast(_preactivation(centred, slope_NC, offset_NC, channel_dim).addcmul(grad, scale), x.dtype)
