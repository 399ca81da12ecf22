"""A complete layer on the compiled back end: streaming passes, and one compiled function for the coefficients.

    forward    m, v = moments(x)        a, b = coefficients(m, v)         y = act(a * (x - m) + b + r)
    backward   da, db = sums(g, x)      dm, dv, parameters: the vector-Jacobian product of `coefficients`      dx

The forward saves x and (N, C) tensors for backward, and also y if a ReLU follows a residual r (see
`exnorm.ops.streaming`).
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms.compiled.coefficients import CoefficientCode, code_of
from exnorm.norms.compiled.key import is_compilable, options_of, tensors_of
from exnorm.ops import plain


def normalize(norm: Any, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor | None:
    """Return the normalized input, with residual and activation; None if the coefficients cannot be compiled."""
    parameters, buffers = tensors_of(norm)
    learned = list(parameters.values())
    tensors = [*learned, *buffers.values()]
    if not all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in tensors):
        return None
    gradient = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in learned))
    key = (
        *options_of(norm),
        norm.num_features,  # given separately: a layer may have no tensor with C channels
        ops.statistics_dtype(x),
        x.device,
        gradient,
        *parameters,  # their names: the order changes when a parametrization is removed
        *[(t.shape, t.dtype, t.device) for t in tensors],
    )
    try:
        code = _codes[key]
    except (KeyError, TypeError):  # a new key, or one with an option that cannot be hashed
        if not is_compilable(norm):
            return None
        code = _codes[key] = code_of(norm, x, gradient=gradient)
    return None if code is None else _Layer.apply(x, residual, norm, act, code, buffers, *learned)  # type: ignore[no-any-return]


_codes: dict[Hashable, CoefficientCode | None] = {}  # by exact shapes; many layers share a code


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm: Any,
        act: str | None,
        code: CoefficientCode,
        buffers: dict[str, Tensor],
        *learned: Tensor,
    ) -> Tensor:
        passes = ops.implementation(x)
        ctx.channel_dim, ctx.act, ctx.code = norm.channel_dim, act, code
        constant = norm.constant_moments(x)
        ctx.is_constant = constant is not None
        if constant is None:
            mean_NC, var_NC = passes.moments(x, norm.channel_dim)
        else:
            mean_NC, var_NC = constant.mean_NC.contiguous(), constant.var_NC
        ctx.frame = _frame(x.shape[0], norm.num_features // code.multiple, ops.length(x, norm.channel_dim), x.device)
        assert code.coefficients is not None
        inputs = [*ctx.frame, mean_NC, var_NC, *learned, *buffers.values()]
        scale_NC, shift_NC, *read = code.coefficients(inputs)
        if not norm.training:
            read = [buffers[name] for name in code.read]
        y = passes.affine(x, mean_NC, scale_NC, shift_NC, residual, ctx.channel_dim, ctx.act)
        ctx.activated_sum = residual is not None and ctx.act is not None
        ctx.save_for_backward(y if ctx.activated_sum else None, x, mean_NC, var_NC, scale_NC, shift_NC, *learned, *read)
        return y

    @staticmethod
    @plain.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, mean_NC, var_NC, scale_NC, shift_NC, *tensors = ctx.saved_tensors
        passes = ops.implementation(x)
        if not any((ctx.needs_input_grad[0], *ctx.needs_input_grad[6:])):
            dresidual = ops.through_relu(grad, y) if ctx.activated_sum else grad
            return None, dresidual, *[None] * (len(ctx.needs_input_grad) - 2)
        affine = (mean_NC, scale_NC, shift_NC)
        *dsums, grad, act = ops.sums(passes, grad, x, y, affine, ctx.channel_dim, ctx.act)
        dresidual = grad if ctx.needs_input_grad[1] else None
        moments = (scale_NC, mean_NC, var_NC)
        slope_NC, offset_NC, *dlearned = ctx.code.gradient([*ctx.frame, *dsums, *moments, *tensors])
        if ctx.is_constant:
            slope_NC = offset_NC = None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = passes.input_gradient(grad, x, *affine, slope_NC, offset_NC, ctx.channel_dim, act)
        return dx, dresidual, None, None, None, None, *dlearned


@functools.lru_cache(maxsize=1024)
def _frame(samples: int, groups: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a tensor whose shape is the sizes of the graph, and the number of positions as a tensor."""
    sizes = torch.empty(samples, groups, device=device)  # inductor checks its strides
    return sizes, torch.tensor(float(length), dtype=torch.float64, device=device)
