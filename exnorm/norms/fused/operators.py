"""A complete layer as one operator for its forward and one for its backward, which `torch.compile` does not trace into.

Traced, the formula of EN's coefficients is hundreds of small operations in each layer, which take minutes to compile
for a ResNet-50. At run time the operators launch the same kernels as `exnorm.norms.fused.layer`. A third one records
the statistics. The operators have no gradient of their own: an autograd function, which the compiler traces, calls one
in its forward and the other in its backward. So a call takes a third of the host's time that an operator of
`torch.library.custom_op` takes (9 instead of 27 microseconds on an AMD EPYC).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exnorm import ops
from exnorm.norms.batch_norm import BatchNorm
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.fused.layer import KERNELS, kernels_of, readable, run_backward, run_forward
from exnorm.norms.fused.scope import NOTHING, record_statistics, recorded
from exnorm.ops.layout import dense

KINDS = {kernels.__name__: kernels for kernels in KERNELS.values()}
LIBRARY = torch.library.Library("exnorm", "FRAGMENT")


def normalize(norm: Any, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor | None:
    """Return the normalized input, with residual and activation; None if the kernels do not support this layer."""
    kernels = kernels_of(norm, x)
    if kernels is None or (norm.weight is None) != (norm.bias is None):
        return None
    learned = [t for name in kernels.PARAMETERS if (t := getattr(norm, name)) is not None]
    batch = isinstance(norm, BatchScopeNorm) and norm.uses_batch_statistics()
    running = [norm.running_mean, norm.running_var] if isinstance(norm, BatchScopeNorm) and not batch else []
    mode, buffers, momentum = recorded(norm, x) if batch else (NOTHING, (), 0.0)
    statistics = running if mode == NOTHING else buffers
    if not readable((*learned, *statistics[:2]), x):
        return None
    if any(one is other for k, one in enumerate(learned) for other in learned[:k]):
        return None  # tied parameters: see below
    if residual is x:
        residual = residual.view_as(residual)  # torch 2.11 loses a gradient of what a function gets twice
    replicas = norm.replicas if batch else 1
    recording = (mode, momentum, isinstance(norm, BatchNorm), replicas)
    options = (kernels.__name__, kernels.key(norm), replicas, norm.eps, norm.channel_dim, act)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *learned)):
        given = (x, residual, options, recording, len(learned), *learned, *statistics)
        return _Layer.apply(*given)  # type: ignore[no-any-return]
    # In torch 2.11, torch.compile mistakes the arguments of a function that needs no gradient.
    return _run(x, residual, options, recording, learned, list(statistics))[0]


def _run(
    x: Tensor,
    residual: Tensor | None,
    options: tuple[Any, ...],
    recording: tuple[Any, ...],
    learned: list[Tensor],
    statistics: list[Tensor],
) -> list[Tensor]:
    """Return the results of `layer`. `statistics` are the running ones that it reads, or the buffers to update."""
    records = recording[0] != NOTHING
    kind, key, replicas, eps, channel_dim, act = options
    running = [] if records else statistics
    results = torch.ops.exnorm.layer(x, residual, learned, running, kind, list(key), replicas, eps, channel_dim, act)
    if records:
        torch.ops.exnorm.record(*results[1:3], *statistics, ops.length(x, channel_dim), *recording)
    return results  # type: ignore[no-any-return]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        options: tuple[Any, ...],
        recording: tuple[Any, ...],
        parameters: int,
        *tensors: Tensor,
    ) -> Tensor:
        learned, statistics = list(tensors[:parameters]), list(tensors[parameters:])
        y, *results = _run(x, residual, options, recording, learned, statistics)
        kind, key, _, *rest = options
        ctx.added, ctx.activated_sum = residual is not None, residual is not None and rest[-1] is not None
        ctx.parameters, ctx.statistics, ctx.options = parameters, len(statistics), (kind, key, *rest)
        ctx.save_for_backward(x, y if ctx.activated_sum else None, *learned, *results)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, *tensors = ctx.saved_tensors
        learned, results = list(tensors[: ctx.parameters]), list(tensors[ctx.parameters :])
        kind, key, *rest = ctx.options
        dx, *others = torch.ops.exnorm.layer_backward(grad, x, y, results, learned, kind, list(key), *rest)
        dresidual = others[-1] if ctx.activated_sum else grad if ctx.added else None
        return dx, dresidual, None, None, None, *others[: ctx.parameters], *[None] * ctx.statistics


class _Stated:
    """What the kernels read of a layer, without statistics to update."""

    def __init__(self, running: list[Tensor], eps: float, replicas: int) -> None:
        self.running_mean, self.running_var = running or (None, None)
        self.training, self.eps, self.replicas = False, eps, replicas

    def uses_batch_statistics(self) -> bool:
        return self.running_mean is None


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


def _shapes(
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


def _backward_shapes(
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


def record(
    mean_NC: Tensor,
    var_NC: Tensor,
    mean_to: Tensor,
    var_to: Tensor,
    count: Tensor,
    length: int,
    into: int,  # a parameter called `mode` would collide with one of torch's
    momentum: float,
    unbiased: bool,
    replicas: int,
) -> None:
    """Update a layer's statistics from the moments of its input, which has `length` positions."""
    size = mean_NC.shape[0] // replicas * length
    factor = size / max(size - 1, 1) if unbiased else 1.0
    record_statistics(mean_NC, var_NC, (mean_to, var_to, count), into, momentum, factor, replicas)


def _register(run: Callable[..., Any], shapes: Callable[..., Any], changed: tuple[str, ...] = ()) -> None:
    schema = torch.library.infer_schema(run, mutates_args=changed)
    LIBRARY.define(run.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
    hidden = torch.compiler.disable(run)  # 0.3 microseconds
    for device in ("CPU", "CUDA"):  # on a CPU Triton's interpreter
        LIBRARY.impl(run.__name__, hidden, device)
    torch.library.register_fake(f"exnorm::{run.__name__}", shapes, lib=LIBRARY)


_register(layer, _shapes)
_register(layer_backward, _backward_shapes)
_register(record, lambda *_: None, ("mean_to", "var_to", "count"))
