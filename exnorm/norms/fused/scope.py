"""BN's scope inside a kernel: the statistics of each replica, and the update of the running statistics.

Legend: N batch, C channels, R replicas of N / R consecutive samples. A program has BC channels and reads all samples,
BN at a time. No kernel uses atomic additions, so results are reproducible bit for bit.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exnorm.ops.triton.launch import Launch

BLOCK: dict[str, Any] = {"BN": 64, "BC": 16, "num_warps": 4}  # narrow, so that 2,048 channels give 128 programs
NOTHING, RUNNING, PENDING = 0, 1, 2  # the statistics that a forward updates


@triton.jit
def replica_statistics(mean_ptr, var_ptr, first, count, channels, c, inside, BN: tl.constexpr, BC: tl.constexpr):
    """Return mean and biased variance of `count` samples from `first` on, (BC,), by the law of total variance."""
    lead = tl.load(mean_ptr + first * channels + c, mask=inside, other=0.0)
    total = tl.zeros((BN, BC), tl.float32)
    squares = tl.zeros((BN, BC), tl.float32)
    within = tl.zeros((BN, BC), tl.float32)
    for start in range(0, count, BN):
        i = start + tl.arange(0, BN)
        valid = (i[:, None] < count) & inside[None, :]
        at = (first + i)[:, None] * channels + c[None, :]
        d = tl.where(valid, tl.load(mean_ptr + at, mask=valid, other=0.0) - lead[None, :], 0.0)
        total += d
        squares += d * d
        within += tl.load(var_ptr + at, mask=valid, other=0.0)
    mean = tl.sum(total, 0) / count
    between = tl.maximum(tl.sum(squares, 0) / count - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return lead + mean, tl.sum(within, 0) / count + between


@triton.jit
def record(mean, var, mean_to_ptr, var_to_ptr, count_ptr, momentum, c, inside, MODE: tl.constexpr):
    """Add the statistics to the pending sums, or update the running ones with `momentum`; count the batch."""
    if MODE != 0:
        old_mean = tl.load(mean_to_ptr + c, mask=inside, other=0.0)
        old_var = tl.load(var_to_ptr + c, mask=inside, other=0.0)
        if MODE == 1:
            mean = old_mean + momentum * (mean - old_mean)
            var = old_var + momentum * (var - old_var)
        else:
            mean += old_mean
            var += old_var
        tl.store(mean_to_ptr + c, mean, mask=inside)
        tl.store(var_to_ptr + c, var, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def batch_statistics(
    mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, mean_to_ptr, var_to_ptr, count_ptr, momentum, unbiased,
    samples, replicas, channels, MODE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """mean_RC, var_RC: (R, C). Grid: blocks of C."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    per = samples // replicas
    total_mean = tl.zeros((BC,), tl.float32)
    total_var = tl.zeros((BC,), tl.float32)
    for r in range(replicas):
        first = (r * per).to(tl.int64)
        mean, var = replica_statistics(mean_ptr, var_ptr, first, per, channels, c, inside, BN, BC)
        tl.store(mean_RC_ptr + r * channels + c, mean, mask=inside)
        tl.store(var_RC_ptr + r * channels + c, var, mask=inside)
        total_mean += mean
        total_var += var
    record(
        total_mean / replicas, total_var / replicas * unbiased, mean_to_ptr, var_to_ptr, count_ptr, momentum,
        c, inside, MODE,
    )  # fmt: skip


def can_record(norm: Any) -> bool:
    """Whether the kernels can update the statistics: all cases but a cumulative mean outside the engine."""
    return norm.momentum is not None or norm.deferred or not norm.training


def recorded(norm: Any, placeholder: Tensor) -> tuple[int, tuple[Tensor, Tensor, Tensor], float]:
    """Return what a forward updates: the mode, the three buffers, and the momentum."""
    if not norm.training or not norm.track_running_stats or norm._buffers.get("running_mean") is None:
        return NOTHING, (placeholder, placeholder, placeholder), 0.0
    buffers = norm._buffers  # faster than the attributes of nn.Module
    if norm.deferred:
        return PENDING, (buffers["pending_mean"], buffers["pending_var"], buffers["pending_count"]), 0.0
    running = (buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"])
    return RUNNING, running, norm.momentum


def note_changes(mode: int, buffers: tuple[Tensor, ...]) -> None:
    """Tell autograd that a kernel has written into buffers, which an earlier forward may have saved."""
    if mode != NOTHING:
        torch.autograd.graph.increment_version(buffers)


@functools.lru_cache(maxsize=1024)
def _statistics_of(samples: int, replicas: int, channels: int, mode: int) -> Launch:
    blocks = triton.cdiv(channels, BLOCK["BC"])
    return Launch(batch_statistics, blocks, (samples, replicas, channels), MODE=mode, **BLOCK)


def statistics_of_scope(norm: Any, mean_NC: Tensor, var_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return BN's mean and variance: the batch's, (R, C), which are recorded in training, or the running ones, (C,)."""
    if not norm.uses_batch_statistics():
        return norm.running_mean, norm.running_var
    mode, buffers, momentum = recorded(norm, mean_NC)
    statistics = record_statistics(mean_NC, var_NC, buffers, mode, momentum, 1.0, norm.replicas)
    note_changes(mode, buffers)
    return statistics


def record_statistics(
    mean_NC: Tensor,
    var_NC: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor],
    mode: int,
    momentum: float,
    unbiased: float,
    replicas: int,
) -> tuple[Tensor, Tensor]:
    """Return the batch's mean and variance, (R, C), and update the buffers, the variance times `unbiased`."""
    samples, channels = mean_NC.shape
    mean_RC, var_RC = mean_NC.new_empty((replicas, channels)), mean_NC.new_empty((replicas, channels))
    launch = _statistics_of(samples, replicas, channels, mode)
    launch(mean_NC, var_NC, mean_RC, var_RC, *buffers, floats=(momentum, unbiased))
    return mean_RC, var_RC
