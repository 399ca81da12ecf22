"""Moments and affine map as two autograd functions with ordinary autograd between them.

    m, v, x', ca, cb = Moments(x)        a, b = f(m, v; parameters)        y = act(a * (x' - m) + b + r)

With `g` the gradient at a * (x - m) + b:

    da = sum_L g * (x - m),   db = sum_L g,   dm = -a * db     (Affine)
    dm, dv                                                     (autograd on the (N, C) tensors in between)
    dx = a * g + p * (x - m) + q,   p = 2 dv / L,   q = dm / L (Moments; dm is the sum of both)

`x'` aliases `x`; `ca` and `cb` are carriers: (N, C) tensors of zeros. `Affine.backward` returns the unchanged gradient
of `y` for `x'`, and the *values* of a and b as the carriers' "gradients". So `Moments.backward` has all that it needs
to write dx in one pass. Only `x` is saved. There are no second derivatives; for those see `exnorm.ops.plain`.

With a residual r, the activation is None or a ReLU. The ReLU's gradient follows from y, which is saved then, as in
`nn.ReLU`. The backward first computes the gradient at the ReLU's input, which is also the gradient of r. Then it
continues as without an activation.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.ops import plain
from exnorm.ops.activations import ACTIVATIONS, through_relu
from exnorm.ops.backend import get_backend, implementation
from exnorm.ops.layout import length


class Streamed(NamedTuple):
    """The input that `moments` returns for `affine`, with its gradient path, and the carriers."""

    x: Tensor
    scale_carrier_NC: Tensor | None
    shift_carrier_NC: Tensor | None


class Sums(NamedTuple):
    """The gradients of scale and shift, and the gradient and activation for the next pass of the backward."""

    dscale_NC: Tensor
    dshift_NC: Tensor
    grad: Tensor  # if a ReLU follows a residual, the gradient at the ReLU's input, which is also the residual's
    act: str | None  # the activation whose derivative is not yet applied


def sums(
    passes: ModuleType,
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    coefficients: tuple[Tensor, Tensor, Tensor],
    channel_dim: int,
    act: str | None,
) -> Sums:
    """Run the third pass of a back end. `y` is the output if a ReLU follows a residual, else None."""
    if y is None:
        dscale_NC, dshift_NC = passes.affine_sums(grad, x, *coefficients, channel_dim, act)
        return Sums(dscale_NC, dshift_NC, grad, act)
    dscale_NC, dshift_NC, gated = passes.gated_sums(grad, x, y, *coefficients, channel_dim)
    return Sums(dscale_NC, dshift_NC, gated, None)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_dim: int, act: str | None) -> tuple[Tensor, ...]:
        mean_NC, var_NC = implementation(x).moments(x, channel_dim)
        ctx.save_for_backward(x, mean_NC)
        ctx.channel_dim, ctx.act = channel_dim, act
        return mean_NC, var_NC, x.view_as(x), torch.zeros_like(mean_NC), torch.zeros_like(mean_NC)

    @staticmethod
    @plain.first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dmean_NC, dvar_NC, grad, scale_NC, shift_NC = grads
        x, mean_NC = ctx.saved_tensors
        positions = length(x, ctx.channel_dim)
        slope_NC, offset_NC = dvar_NC * (2 / positions), dmean_NC / positions
        coefficients = (mean_NC, scale_NC, shift_NC, slope_NC, offset_NC)
        return implementation(x).input_gradient(grad, x, *coefficients, ctx.channel_dim, ctx.act), None, None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean_NC: Tensor,
        scale_NC: Tensor,
        shift_NC: Tensor,
        scale_carrier_NC: Tensor | None,
        shift_carrier_NC: Tensor | None,
        residual: Tensor | None,
        channel_dim: int,
        act: str | None,
    ) -> Tensor:
        y = implementation(x).affine(x, mean_NC, scale_NC, shift_NC, residual, channel_dim, act)
        ctx.activated_sum = residual is not None and act is not None
        ctx.save_for_backward(x, mean_NC, scale_NC, shift_NC, *((y,) if ctx.activated_sum else ()))
        ctx.channel_dim, ctx.act, ctx.carried = channel_dim, act, scale_carrier_NC is not None
        return y

    @staticmethod
    @plain.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean_NC, scale_NC, shift_NC, *output = ctx.saved_tensors
        coefficients, act = (mean_NC, scale_NC, shift_NC), ctx.act
        dx = dmean_NC = dscale_NC = dshift_NC = None
        if any(ctx.needs_input_grad[1:4]):
            y = output[0] if ctx.activated_sum else None
            found = sums(implementation(x), grad, x, y, coefficients, ctx.channel_dim, act)
            dscale_NC, dshift_NC, grad, act = found
            dmean_NC = -scale_NC * dshift_NC
        elif ctx.activated_sum:
            grad, act = through_relu(grad, output[0]), None
        dresidual = grad if ctx.needs_input_grad[6] else None
        if ctx.carried:
            return grad, dmean_NC, dscale_NC, dshift_NC, scale_NC, shift_NC, dresidual, None, None
        if ctx.needs_input_grad[0]:
            dx = implementation(x).input_gradient(grad, x, *coefficients, None, None, ctx.channel_dim, act)
        return dx, dmean_NC, dscale_NC, dshift_NC, None, None, dresidual, None, None


def moments(x: Tensor, *, channel_dim: int = 1, act: str | None = None) -> tuple[Tensor, Tensor, Streamed]:
    """Mean and biased variance of each (sample, channel) over its positions.

    Args:
        x: (N, C, *spatial), or (N, *spatial, C) with `channel_dim=-1`.
        act: the activation that the following `affine` will apply: its derivative is part of the gradient of `x`. None
            if `affine` adds a residual.

    Returns:
        mean_NC, var_NC in float32 (float64 for float64 input), and a `Streamed`, which `affine` takes in place of `x`.
        The gradient of `x` is correct only if `affine` is called exactly once with the `Streamed`, and with this mean.
    """
    _check_activation(act)
    if needs_plain_autograd():
        return *plain.moments(x, channel_dim), Streamed(x, None, None)
    mean_NC, var_NC, alias, scale_carrier_NC, shift_carrier_NC = _Moments.apply(x, channel_dim, act)
    return mean_NC, var_NC, Streamed(alias, scale_carrier_NC, shift_carrier_NC)


def affine(
    x: Tensor | Streamed,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    *,
    residual: Tensor | None = None,
    channel_dim: int = 1,
    act: str | None = None,
) -> Tensor:
    """act(scale * (x - mean) + shift + residual), one pass, in the dtype of `x`.

    Args:
        x: the `Streamed` of `moments`, or a plain tensor if the coefficients do not depend on its moments.
        mean_NC: the mean that `moments` returned; for a plain tensor any centre.
        scale_NC: of the shape of the mean, or broadcastable to it.
        shift_NC: the preactivation at the mean, in such a shape, too.
        residual: a tensor of the shape of `x` that is added before the activation, or None.
        act: None or a key of `ACTIVATIONS`, the same as in the call of `moments`; with a residual None or "relu".
    """
    _check_activation(act)
    if residual is not None and act not in (None, "relu"):
        raise UserError(f"activation {act!r} cannot be fused behind a residual; allowed: None, relu")
    if needs_plain_autograd():
        source = x.x if isinstance(x, Streamed) else x
        return plain.affine(source, mean_NC, scale_NC, shift_NC, residual, channel_dim, act)
    scale_NC, shift_NC = fitted(scale_NC, mean_NC), fitted(shift_NC, mean_NC)
    if isinstance(x, Streamed):
        carriers = (x.scale_carrier_NC, x.shift_carrier_NC)
        return _Affine.apply(x.x, mean_NC, scale_NC, shift_NC, *carriers, residual, channel_dim, act)
    return _Affine.apply(x, mean_NC, scale_NC, shift_NC, None, None, residual, channel_dim, act)


def needs_plain_autograd() -> bool:
    """Whether the primitives run as plain operations: by choice, or because torch transforms or traces them."""
    return get_backend() == "plain" or plain.is_transformed()


def fitted(coefficient: Tensor, mean_NC: Tensor) -> Tensor:
    """Return a coefficient in the shape and dtype of the mean, as the passes need it."""
    if coefficient.shape == mean_NC.shape and coefficient.dtype == mean_NC.dtype:
        return coefficient
    return coefficient.to(mean_NC.dtype).expand(mean_NC.shape)


def _check_activation(act: str | None) -> None:
    if act is not None and act not in ACTIVATIONS:
        raise UserError(f"unknown activation {act!r} to fuse; allowed: None, {', '.join(ACTIVATIONS)}")
