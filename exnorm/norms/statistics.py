"""Statistics of every scope from the per-(sample, channel) moments, by the law of total variance in centred form.

    IN: m, v      LN: mu = mean_c m, var = mean_c v + mean_c (m - mu)^2      GN: the same within a group
    BN: the same over the samples of one replica

No E[x^2] - E[x]^2 anywhere: it cancels where the mean is large.
Legend: N batch, C channels, L positions, G groups, R replicas on this device, P processes of one replica.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Moments(NamedTuple):
    """The moments of one batch and BN's scope in it.

    Attributes:
        mean_NC: mean of each (sample, channel).
        var_NC: biased variance of each (sample, channel).
        length: L, the number of positions behind each moment.
        replicas: how many replicas this batch holds, of N / replicas consecutive samples each.
        group: the process group that one replica spans, or None if it lies on this device.
        record: whether, in training, batch statistics taken from them update the running statistics.
    """

    mean_NC: Tensor
    var_NC: Tensor
    length: int
    replicas: int = 1
    group: Any = None
    record: bool = True


class Statistics(NamedTuple):
    """A mean and a biased variance, each broadcastable to (N, C)."""

    mean: Tensor
    var: Tensor


class ReplicaStatistics(NamedTuple):
    """BN's mean and biased variance of each replica, and the number of values of one channel in its scope."""

    mean_RC: Tensor
    var_RC: Tensor
    count: Any


def _total(mean: Tensor, var: Tensor, dim: int, weight: Tensor | None = None) -> Statistics:
    """Return mean and variance of the union of sets. The sets lie along `dim`, which is kept.

    Args:
        weight: each set's share of the values times the number of sets; None for equally large ones.
    """

    def average(value: Tensor) -> Tensor:
        return (value if weight is None else weight * value).mean(dim, keepdim=True)

    mean_all = average(mean)
    return Statistics(mean_all, average(var) + average((mean - mean_all).square()))


def instance_statistics(moments: Moments) -> Statistics:
    """IN: over the positions of one sample and channel, (N, C)."""
    return Statistics(moments.mean_NC, moments.var_NC)


def layer_statistics(moments: Moments) -> Statistics:
    """LN: over the channels and positions of one sample, (N, 1)."""
    return _total(moments.mean_NC, moments.var_NC, 1)


def group_statistics(moments: Moments, num_groups: int) -> Statistics:
    """GN: over the channels of one group and the positions of one sample, (N, G, 1)."""
    shape = (num_groups, -1)
    return _total(moments.mean_NC.unflatten(1, shape), moments.var_NC.unflatten(1, shape), 2)


def replica_statistics(moments: Moments) -> ReplicaStatistics:
    """BN: over the samples and positions of each replica, weighted by their number in each process."""
    samples, channels = moments.mean_NC.shape
    count = samples // moments.replicas * moments.length
    shape = (moments.replicas, samples // moments.replicas, channels)
    mean, var = moments.mean_NC.reshape(shape), moments.var_NC.reshape(shape)
    if moments.group is None:
        mean, var = _total(mean, var, 1)
    else:
        # A process without values still takes part in forward and backward: its sums are 0, with a gradient.
        mean, var = _total(mean, var, 1) if count else Statistics(mean.sum(1, keepdim=True), var.sum(1, keepdim=True))
        mean, var, count = _over_group(mean, var, count, moments.group)
    return ReplicaStatistics(mean.reshape(-1, channels), var.reshape(-1, channels), count)


def _over_group(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics over all processes of a group, and the number of values in it, without a GPU sync."""
    local = torch.cat((torch.stack((mean, var)).flatten(), mean.new_full((1,), count)))
    gathered = _GatherOverGroup.apply(local, group)
    counts = gathered[:, -1].detach().double()
    # In float64 the weight is exactly 1 if all counts are equal.
    weight = (counts * len(counts) / counts.sum()).to(mean.dtype).reshape(-1, *(1,) * mean.ndim)
    means, variances = gathered[:, :-1].unflatten(1, (2, *mean.shape)).unbind(1)
    mean_all, var_all = _total(means, variances, 0, weight)
    return mean_all, var_all, counts.sum()


def replica_to_sample(statistic_RC: Tensor, moments: Moments) -> Tensor:
    """Each sample's value of a per-replica statistic: (N, C), or (1, C) for one replica."""
    if moments.replicas == 1:
        return statistic_RC
    return statistic_RC.repeat_interleave(moments.mean_NC.shape[0] // moments.replicas, 0)


class _GatherOverGroup(torch.autograd.Function):
    """Stacks a tensor of every process of a group along a new first dimension; one all-reduce each way."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rank = group, dist.get_rank(group)
        gathered = local.new_zeros((dist.get_world_size(group), *local.shape))
        gathered[ctx.rank] = local
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rank], None
