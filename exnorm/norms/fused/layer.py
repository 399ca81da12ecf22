"""A complete layer on the Triton back end: the streaming passes, and fused kernels for the coefficients between them.

    forward    m, v = moments(x)        a, b = coefficients(m, v)           y = act(a * (x - m) + b + r)
    backward   da, db = sums(g, x)      2 dv / L, dm / L, parameters        dx

The forward saves x and (N, C) tensors for backward, and also y if a ReLU follows a residual r (see
`exnorm.ops.streaming`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms.batch_norm import BatchNorm
from exnorm.norms.exemplar_norm import ExemplarNorm
from exnorm.norms.fused import batch_norm, exemplar_norm, group_norm, switch_norm
from exnorm.norms.group_norm import GroupNorm
from exnorm.norms.instance_norm import InstanceNorm
from exnorm.norms.layer_norm import LayerNorm
from exnorm.norms.switch_norm import SwitchNorm
from exnorm.ops import plain
from exnorm.ops import triton as passes

# By exact type: a subclass may have another formula.
KERNELS: dict[type[nn.Module], Any] = {
    BatchNorm: batch_norm,
    GroupNorm: group_norm,
    LayerNorm: group_norm,
    InstanceNorm: group_norm,
    SwitchNorm: switch_norm,
    ExemplarNorm: exemplar_norm,
}


def kernels_of(norm: Any, x: Tensor) -> Any:
    """Return the module with the kernels of this layer, in its mode, for this input; None if there are none."""
    kernels = KERNELS.get(type(norm))
    return kernels if kernels is not None and passes.serves(x) and kernels.serves(norm) else None


def serves(norm: Any, x: Tensor) -> bool:
    """Whether the kernels support this layer, with its options and in its mode, and this input."""
    if kernels_of(norm, x) is None:
        return False
    # Tensors among the attributes are weights that each forward makes anew (pruning, replicas of DataParallel).
    for value in vars(norm).values():
        if isinstance(value, Tensor):
            return False
    parameters = norm._parameters  # faster than the attributes of nn.Module
    if (parameters.get("weight") is None) != (parameters.get("bias") is None):
        return False
    return readable((*parameters.values(), norm._buffers.get("running_mean")), x)


def readable(tensors: Iterable[Tensor | None], x: Tensor) -> bool:
    """Whether the kernels, which read addresses, can read the tensors of a layer, where they are, for this input."""
    device = x.device
    # A loop takes half the time of `all` over a generator, and each layer asks in each forward.
    for t in tensors:
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous() and t.device == device):
            return False
    return True


def normalize(norm: Any, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    """Return the normalized input, with residual and activation."""
    kernels = KERNELS[type(norm)]
    coefficients = kernels.coefficients(norm, x.shape[0], ops.length(x, norm.channel_dim))
    # By name, because the order of the parameters can change (when a parametrization is removed, for example).
    learned = [t for name in kernels.PARAMETERS if (t := norm._parameters.get(name)) is not None]
    return _Layer.apply(x, residual, norm, act, coefficients, *learned)  # type: ignore[no-any-return]


def run_forward(
    coefficients: Any,
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    learned: Sequence[Tensor],
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, ...]:
    """Return the output, the moments, scale_NC, shift_NC and what else the backward of the coefficients reads."""
    mean_NC, var_NC = passes.moments(x, channel_dim)
    scale_NC, shift_NC, *saved = coefficients.forward(norm, mean_NC, var_NC, learned)
    y = passes.affine(x, mean_NC, scale_NC, shift_NC, residual, channel_dim, act)
    return y, mean_NC, var_NC, scale_NC, shift_NC, *saved


def run_backward(
    coefficients: Any,
    eps: float,
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    results: Sequence[Tensor],
    learned: Sequence[Tensor],
    channel_dim: int,
    act: str | None,
    *,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Return dx, the residual's gradient and those of the parameters.

    Args:
        y: the output if a ReLU follows a residual, else None.
        results: what `run_forward` returned after the output.
    """
    mean_NC, var_NC, scale_NC, shift_NC, *saved = results
    affine = (mean_NC, scale_NC, shift_NC)
    *sums, grad, act = ops.sums(passes, grad, x, y, affine, channel_dim, act)
    slope_NC, offset_NC, *dlearned = coefficients.backward(eps, sums, (mean_NC, var_NC), learned, saved)
    dx = passes.input_gradient(grad, x, *affine, slope_NC, offset_NC, channel_dim, act) if needs_dx else None
    return dx, grad, dlearned


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm: Any, act: str | None, coefficients: Any, *learned: Tensor
    ) -> Tensor:
        ctx.channel_dim, ctx.act, ctx.coefficients, ctx.eps = norm.channel_dim, act, coefficients, norm.eps
        ctx.learned = len(learned)
        y, *results = run_forward(coefficients, norm, x, residual, learned, ctx.channel_dim, act)
        ctx.save_for_backward(y if residual is not None and act is not None else None, x, *learned, *results)
        return y

    @staticmethod
    @plain.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, *tensors = ctx.saved_tensors
        learned, results = tensors[: ctx.learned], tensors[ctx.learned :]
        given = (grad, x, y, results, learned, ctx.channel_dim, ctx.act)
        dx, grad, dlearned = run_backward(ctx.coefficients, ctx.eps, *given, needs_dx=ctx.needs_input_grad[0])
        return dx, grad if ctx.needs_input_grad[1] else None, None, None, None, *dlearned
