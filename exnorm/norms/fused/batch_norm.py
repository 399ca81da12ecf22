"""BN's coefficients on a GPU: one launch forward, one backward. Grid: blocks of C. See `exnorm.norms.batch_norm`.

scale = weight * r,   shift = bias + scale * (m - mu),   r = (var + eps)^-1/2
with s = dscale + dshift * (m - mu):   dvar = -1/2 r^3 weight * sum_n s,   dmu = -weight * r * sum_n dshift
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exnorm.norms.fused.scope import BLOCK, NOTHING, can_record, note_changes, record, recorded, replica_statistics
from exnorm.ops.triton.launch import Launch

PARAMETERS = ("weight", "bias")  # in the order of `learned`


@triton.jit
def forward_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_RC_ptr, rstd_RC_ptr,
    mean_to_ptr, var_to_ptr, count_ptr, momentum, unbiased, eps, samples, replicas, channels,
    MODE: tl.constexpr, AFFINE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """scale, shift: (N, C); mean_RC, rstd_RC: (R, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0) if AFFINE else tl.full((BC,), 1.0, tl.float32)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0) if AFFINE else tl.zeros((BC,), tl.float32)
    per = samples // replicas
    total_mean = tl.zeros((BC,), tl.float32)
    total_var = tl.zeros((BC,), tl.float32)
    for r in range(replicas):
        first = (r * per).to(tl.int64)
        mu, var = replica_statistics(mean_ptr, var_ptr, first, per, channels, c, inside, BN, BC)
        rstd = 1.0 / tl.sqrt(var + eps)
        tl.store(mean_RC_ptr + r * channels + c, mu, mask=inside)
        tl.store(rstd_RC_ptr + r * channels + c, rstd, mask=inside)
        total_mean += mu
        total_var += var
        scale = weight * rstd
        for start in range(0, per, BN):
            i = start + tl.arange(0, BN)
            valid = (i[:, None] < per) & inside[None, :]
            at = (first + i)[:, None] * channels + c[None, :]
            d = tl.load(mean_ptr + at, mask=valid, other=0.0) - mu[None, :]
            tl.store(scale_ptr + at, tl.broadcast_to(scale[None, :], (BN, BC)), mask=valid)
            tl.store(shift_ptr + at, bias[None, :] + scale[None, :] * d, mask=valid)
    record(
        total_mean / replicas, total_var / replicas * unbiased, mean_to_ptr, var_to_ptr, count_ptr, momentum,
        c, inside, MODE,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, weight_ptr, mean_RC_ptr, rstd_RC_ptr,
    slope_ptr, offset_ptr, dweight_ptr, dbias_ptr, length, samples, replicas, channels,
    AFFINE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """slope = 2 dv / L and offset = dm / L, (N, C); dweight, dbias: (C,)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0) if AFFINE else tl.full((BC,), 1.0, tl.float32)
    per = samples // replicas
    dweight = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    for r in range(replicas):
        first = (r * per).to(tl.int64)
        mu = tl.load(mean_RC_ptr + r * channels + c, mask=inside, other=0.0)
        rstd = tl.load(rstd_RC_ptr + r * channels + c, mask=inside, other=0.0)
        sum_scale = tl.zeros((BN, BC), tl.float32)
        sum_shift = tl.zeros((BN, BC), tl.float32)
        for start in range(0, per, BN):
            i = start + tl.arange(0, BN)
            valid = (i[:, None] < per) & inside[None, :]
            at = (first + i)[:, None] * channels + c[None, :]
            d = tl.load(mean_ptr + at, mask=valid, other=0.0) - mu[None, :]
            dshift = tl.load(dshift_ptr + at, mask=valid, other=0.0)
            sum_scale += tl.load(dscale_ptr + at, mask=valid, other=0.0) + dshift * d
            sum_shift += dshift
        dscale_C = tl.sum(sum_scale, 0)
        dshift_C = tl.sum(sum_shift, 0)
        dweight += dscale_C * rstd
        dbias += dshift_C
        dvar = -0.5 * dscale_C * weight * rstd * rstd * rstd / per
        dmu = -dshift_C * weight * rstd / per
        for start in range(0, per, BN):
            i = start + tl.arange(0, BN)
            valid = (i[:, None] < per) & inside[None, :]
            at = (first + i)[:, None] * channels + c[None, :]
            d = tl.load(mean_ptr + at, mask=valid, other=0.0) - mu[None, :]
            tl.store(slope_ptr + at, tl.broadcast_to((2 * dvar / length)[None, :], (BN, BC)), mask=valid)
            tl.store(offset_ptr + at, (dmu[None, :] + 2 * dvar[None, :] * d) / length, mask=valid)
    if AFFINE:
        tl.store(dweight_ptr + c, dweight, mask=inside)
        tl.store(dbias_ptr + c, dbias, mask=inside)


def serves(norm: Any) -> bool:
    """Whether these kernels support this layer: it uses batch statistics, and `can_record` is true."""
    return norm.uses_batch_statistics() and can_record(norm)


class Coefficients:
    """The launches of a BN for inputs of one shape.

    Args:
        mode: the statistics that a forward updates: `scope.NOTHING`, `RUNNING` or `PENDING`.
    """

    def __init__(
        self, samples: int, length: int, channels: int, replicas: int, affine: bool, mode: int = NOTHING
    ) -> None:
        blocks, sizes = triton.cdiv(channels, BLOCK["BC"]), (samples, replicas, channels)
        count = samples // replicas * length
        self.shape, self.unbiased = (replicas, channels), count / max(count - 1, 1)
        self.forward_launch = Launch(forward_kernel, blocks, sizes, MODE=mode, AFFINE=bool(affine), **BLOCK)
        self.backward_launch = Launch(backward_kernel, blocks, (length, *sizes), AFFINE=bool(affine), **BLOCK)

    def forward(self, norm: Any, mean_NC: Tensor, var_NC: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return scale_NC, shift_NC, and the tensors that the backward reads."""
        scale_NC, shift_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        mean_RC, rstd_RC = mean_NC.new_empty(self.shape), mean_NC.new_empty(self.shape)
        mode, buffers, momentum = recorded(norm, mean_NC)
        pair = learned or (mean_NC, mean_NC)
        tensors = (mean_NC, var_NC, *pair, scale_NC, shift_NC, mean_RC, rstd_RC, *buffers)
        self.forward_launch(*tensors, floats=(momentum, self.unbiased, norm.eps))
        note_changes(mode, buffers)
        return scale_NC, shift_NC, mean_RC, rstd_RC

    def backward(
        self,
        eps: float,
        sums: Sequence[Tensor],
        moments: Sequence[Tensor],
        learned: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return slope_NC, offset_NC, and the gradients of the parameters."""
        mean_NC = moments[0]
        slope_NC, offset_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        gradients = [torch.empty_like(parameter) for parameter in learned]
        weight = learned[0] if learned else mean_NC
        self.backward_launch(*sums, mean_NC, weight, *saved, slope_NC, offset_NC, *(gradients or (mean_NC, mean_NC)))
        return slope_NC, offset_NC, *gradients


launches = functools.lru_cache(maxsize=1024)(Coefficients)


def key(norm: Any) -> tuple[int, ...]:
    """Return the options of a layer on which its launches depend."""
    return norm.num_features, norm.replicas, norm.weight is not None


def saved_shapes(samples: int, channels: int, replicas: int, affine: int) -> list[tuple[int, ...]]:
    """Return the shapes of what a forward saves."""
    return [(replicas, channels)] * 2


def coefficients(norm: Any, samples: int, length: int) -> Coefficients:
    """Return the launches of this layer for this number of samples and positions."""
    return launches(samples, length, *key(norm), recorded(norm, norm.running_mean)[0])
