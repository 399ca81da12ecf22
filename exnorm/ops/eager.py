"""The streaming primitives as plain torch operations, on any device.

Legend: N batch, C channels, L positions. Big tensors have the shape of `x`; coefficients and sums are (N, C) in
float32 (float64 for float64 input), whatever the dtype of `x`.
"""

from torch import Tensor, addcmul

from exnorm.ops.activations import ACTIVATIONS
from exnorm.ops.layout import cast, expand_coefficients, spatial_dims, statistics_dtype


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions of each (sample, channel); two passes, centred."""
    dims = spatial_dims(x, channel_dim)
    x = cast(x, statistics_dtype(x))
    if not dims:
        return x.clone(), x.new_zeros(x.shape)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var_NC = centred.square_().mean(dims)
    return mean.reshape(var_NC.shape), var_NC


def _preactivation(x: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int) -> Tensor:
    scale = expand_coefficients(scale_NC, x, channel_dim)
    shift = expand_coefficients(shift_NC, x, channel_dim)
    return addcmul(shift, cast(x, scale.dtype), scale)


def affine(x: Tensor, scale_NC: Tensor, shift_NC: Tensor, channel_dim: int, act: str | None) -> Tensor:
    """act(scale * x + shift) in the dtype and memory format of `x`."""
    y = _preactivation(x, scale_NC, shift_NC, channel_dim)
    if act is not None:
        y = ACTIVATIONS[act].apply_(y)
    return cast(y, x.dtype)


def _through_activation(
    grad: Tensor,
    x: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """The gradient at scale * x + shift, in the coefficients' dtype."""
    grad = cast(grad, scale_NC.dtype)
    if act is None:
        return grad
    return ACTIVATIONS[act].backward_(_preactivation(x, scale_NC, shift_NC, channel_dim), grad)


def affine_sums(
    grad: Tensor,
    x: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """sum_L g * x and sum_L g, the gradients of scale and shift; g is the gradient behind the activation."""
    grad = _through_activation(grad, x, scale_NC, shift_NC, channel_dim, act)
    dims = spatial_dims(x, channel_dim)
    product = grad * x
    if not dims:
        return product, grad
    return product.sum(dims), grad.sum(dims)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    slope_NC: Tensor | None,
    offset_NC: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """scale * g + slope * x + offset; without slope and offset, scale * g."""
    grad = _through_activation(grad, x, scale_NC, shift_NC, channel_dim, act)
    scale = expand_coefficients(scale_NC, x, channel_dim)
    if slope_NC is None or offset_NC is None:
        return cast(grad * scale, x.dtype)
    slope = expand_coefficients(slope_NC, x, channel_dim)
    offset = expand_coefficients(offset_NC, x, channel_dim)
    dx = addcmul(offset, cast(x, scale.dtype), slope)
    return cast(dx.addcmul_(grad, scale), x.dtype)
