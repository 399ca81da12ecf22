"""A complete layer as one operator for its forward and one for its backward, which `torch.compile` does not trace into.

Traced, the formula of EN's coefficients is hundreds of small operations in each layer, which take minutes to compile
for a ResNet-50. At run time the operators launch the same kernels as `exnorm.norms.fused.layer`. An operator with a
gradient must not write into its inputs, so the running statistics are recorded outside, from the moments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exnorm import ops
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.fused.layer import KERNELS, kernels_of, readable, run_backward, run_forward
from exnorm.norms.statistics import Moments
from exnorm.ops.layout import dense

KINDS = {kernels.__name__: kernels for kernels in KERNELS.values()}


def normalize(norm: Any, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor | None:
    """Return the normalized input, with residual and activation; None if the kernels do not support this layer."""
    kernels = kernels_of(norm, x)
    if kernels is None or (norm.weight is None) != (norm.bias is None):
        return None
    learned = [t for name in kernels.PARAMETERS if (t := getattr(norm, name)) is not None]
    batch = isinstance(norm, BatchScopeNorm) and norm.uses_batch_statistics()
    running = [norm.running_mean, norm.running_var] if isinstance(norm, BatchScopeNorm) and not batch else []
    if not readable((*learned, *running), x):
        return None
    replicas = norm.replicas if batch else 1
    options = (kernels.__name__, list(kernels.key(norm)), replicas, norm.eps, norm.channel_dim, act)
    y, mean_NC, var_NC, *_ = torch.ops.exnorm.layer(x, residual, learned, running, *options)
    if batch and norm.training:
        with torch.no_grad():
            length = ops.length(x, norm.channel_dim)
            norm.batch_statistics(Moments(mean_NC.detach(), var_NC.detach(), length, *norm.scope()))
    return y


class _Stated:
    """What the kernels read of a layer, without running statistics to update."""

    training = track_running_stats = False

    def __init__(self, running: Sequence[Tensor], eps: float, replicas: int) -> None:
        self.running_mean, self.running_var = running or (None, None)
        self._buffers: dict[str, Tensor] = {}
        self.eps, self.replicas = eps, replicas

    def uses_batch_statistics(self) -> bool:
        return self.running_mean is None


@torch.library.custom_op("exnorm::layer", mutates_args=())
def layer(
    x: Tensor,
    residual: Tensor | None,
    learned: list[Tensor],
    running: list[Tensor],
    kind: str,
    key: list[int],
    replicas: int,
    eps: float,
    channel_dim: int,
    act: str | None,
) -> list[Tensor]:
    """Return the output, the moments, scale_NC, shift_NC and what the backward reads."""
    coefficients = KINDS[kind].launches(x.shape[0], ops.length(x, channel_dim), *key)
    results = run_forward(coefficients, _Stated(running, eps, replicas), x, residual, learned, channel_dim, act)
    # No result may be an input.
    return [t.clone() if any(t is given for given in running) else t for t in results]


@layer.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    learned: list[Tensor],
    running: list[Tensor],
    kind: str,
    key: list[int],
    replicas: int,
    eps: float,
    channel_dim: int,
    act: str | None,
) -> list[Tensor]:
    samples, channels = x.shape[0], x.shape[channel_dim]
    shapes = [(samples, channels)] * 4 + KINDS[kind].saved_shapes(samples, *key)
    return [torch.empty_like(dense(x, channel_dim)), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)]


@torch.library.custom_op("exnorm::layer_backward", mutates_args=())
def layer_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    results: list[Tensor],
    learned: list[Tensor],
    kind: str,
    key: list[int],
    eps: float,
    channel_dim: int,
    act: str | None,
) -> list[Tensor]:
    """Return dx, the gradients of the parameters and, if a ReLU follows a residual (`y` is given), the residual's."""
    coefficients = KINDS[kind].launches(x.shape[0], ops.length(x, channel_dim), *key)
    dx, gated, dlearned = run_backward(coefficients, eps, grad, x, y, results, learned, channel_dim, act)
    assert dx is not None
    return [dx, *dlearned, *([] if y is None else [gated])]


@layer_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    results: list[Tensor],
    learned: list[Tensor],
    kind: str,
    key: list[int],
    eps: float,
    channel_dim: int,
    act: str | None,
) -> list[Tensor]:
    like = dense(x, channel_dim)
    return [torch.empty_like(t) for t in (like, *learned, *([] if y is None else [like]))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, learned, running, kind, key, _, *rest = inputs
    y, *results = output
    ctx.options, ctx.counts = (kind, key, *rest), (len(learned), len(running))
    ctx.added, ctx.activated_sum = residual is not None, residual is not None and rest[-1] is not None
    ctx.save_for_backward(x, y if ctx.activated_sum else None, *learned, *results)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, y, *tensors = ctx.saved_tensors
    learned, running = ctx.counts
    dx, *others = torch.ops.exnorm.layer_backward(grads[0], x, y, tensors[learned:], tensors[:learned], *ctx.options)
    dresidual = others.pop() if ctx.activated_sum else grads[0] if ctx.added else None
    return dx, dresidual, others, [None] * running, *[None] * 6


layer.register_autograd(_backward, setup_context=_setup)
