"""SN's coefficients on a GPU: two launches forward, two backward. See `exnorm.norms.switch_norm`.

    mu = sum_k w_k mu_k,   var = sum_k u_k var_k,   scale = weight * r,   shift = bias + scale * (m - mu)
    with s = dscale + dshift * (m - mu):   dvar = -1/2 r^3 weight * s,   dmu = -scale * dshift   of each (n, c)
    dw_k = sum_nc dmu * mu_k,   du_k = sum_nc dvar * var_k,   then through the softmaxes

Forward: first BN's statistics (`scope.batch_statistics`). Then one program per sample, which holds all its channels,
computes LN's statistics and the coefficients.

Backward: `samples_kernel` has one program per sample, and writes sums over the sample's channels. `channels_kernel` has
one program per block of channels. It goes back through BN's statistics and writes all results.

Legend: N batch, C channels, R replicas of N / R samples. Order of the normalizers: in, ln, bn.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exnorm.norms.fused.scope import BLOCK, can_record, statistics_of_scope
from exnorm.ops.triton.launch import Launch

LARGEST = 8192  # channels that a program can hold
PARTS = 8  # values per sample: dmu and dvar of LN, three sums for w, three for u

PARAMETERS = ("weight", "bias", "mean_weight", "var_weight")  # in the order of `learned`


@triton.jit
def softmax(logits_ptr):
    """Return the softmax of three numbers."""
    a = tl.load(logits_ptr)
    b = tl.load(logits_ptr + 1)
    c = tl.load(logits_ptr + 2)
    top = tl.maximum(a, tl.maximum(b, c))
    a = tl.exp(a - top)
    b = tl.exp(b - top)
    c = tl.exp(c - top)
    total = a + b + c
    return a / total, b / total, c / total


@triton.jit
def forward_kernel(
    mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, mean_weight_ptr, var_weight_ptr, weight_ptr, bias_ptr,
    scale_ptr, shift_ptr, layer_ptr, eps, per, channels, AFFINE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """scale, shift: (N, C); layer: (N, 2), LN's mean and variance. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    m = tl.load(mean_ptr + n * channels + c, mask=inside, other=0.0)
    v = tl.load(var_ptr + n * channels + c, mask=inside, other=0.0)
    mean_bn = tl.load(mean_RC_ptr + n // per * channels + c, mask=inside, other=0.0)
    var_bn = tl.load(var_RC_ptr + n // per * channels + c, mask=inside, other=0.0)
    mean_ln = tl.sum(m, 0) / channels
    d = tl.where(inside, m - mean_ln, 0.0)
    var_ln = tl.sum(v + d * d, 0) / channels
    w_in, w_ln, w_bn = softmax(mean_weight_ptr)
    u_in, u_ln, u_bn = softmax(var_weight_ptr)
    scale = 1.0 / tl.sqrt(u_in * v + u_ln * var_ln + u_bn * var_bn + eps)
    shift = tl.zeros((BC,), tl.float32)
    if AFFINE:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0.0)
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0)
    shift += scale * (m - (w_in * m + w_ln * mean_ln + w_bn * mean_bn))
    tl.store(scale_ptr + n * channels + c, scale, mask=inside)
    tl.store(shift_ptr + n * channels + c, shift, mask=inside)
    tl.store(layer_ptr + n * 2, mean_ln)
    tl.store(layer_ptr + n * 2 + 1, var_ln)


@triton.jit
def samples_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, layer_ptr, mean_weight_ptr, var_weight_ptr,
    weight_ptr, parts_ptr, eps, per, channels, AFFINE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts: (N, 8), see PARTS. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    m = tl.load(mean_ptr + n * channels + c, mask=inside, other=0.0)
    v = tl.load(var_ptr + n * channels + c, mask=inside, other=0.0)
    mean_bn = tl.load(mean_RC_ptr + n // per * channels + c, mask=inside, other=0.0)
    var_bn = tl.load(var_RC_ptr + n // per * channels + c, mask=inside, other=0.0)
    mean_ln = tl.load(layer_ptr + n * 2)
    var_ln = tl.load(layer_ptr + n * 2 + 1)
    w_in, w_ln, w_bn = softmax(mean_weight_ptr)
    u_in, u_ln, u_bn = softmax(var_weight_ptr)
    rstd = 1.0 / tl.sqrt(u_in * v + u_ln * var_ln + u_bn * var_bn + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0) if AFFINE else tl.full((BC,), 1.0, tl.float32)
    dshift = tl.load(dshift_ptr + n * channels + c, mask=inside, other=0.0)
    dscale = tl.load(dscale_ptr + n * channels + c, mask=inside, other=0.0)
    dscale += dshift * (m - (w_in * m + w_ln * mean_ln + w_bn * mean_bn))
    dvar = tl.where(inside, -0.5 * rstd * rstd * rstd * weight * dscale, 0.0)
    dmu = tl.where(inside, -weight * rstd * dshift, 0.0)
    total_mu = tl.sum(dmu, 0)
    total_var = tl.sum(dvar, 0)
    parts_ptr += n * 8
    tl.store(parts_ptr, w_ln * total_mu)
    tl.store(parts_ptr + 1, u_ln * total_var)
    tl.store(parts_ptr + 2, tl.sum(dmu * m, 0))
    tl.store(parts_ptr + 3, total_mu * mean_ln)
    tl.store(parts_ptr + 4, tl.sum(dmu * mean_bn, 0))
    tl.store(parts_ptr + 5, tl.sum(dvar * v, 0))
    tl.store(parts_ptr + 6, total_var * var_ln)
    tl.store(parts_ptr + 7, tl.sum(dvar * var_bn, 0))


@triton.jit
def channels_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, layer_ptr, parts_ptr,
    mean_weight_ptr, var_weight_ptr, weight_ptr, slope_ptr, offset_ptr,
    dweight_ptr, dbias_ptr, dmean_weight_ptr, dvar_weight_ptr, eps, length, samples, replicas, channels,
    BATCH: tl.constexpr, AFFINE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """slope = 2 dv / L, offset = dm / L, (N, C), and the gradients of the parameters. Grid: blocks of C.

    BATCH: BN's statistics are the batch's, so gradients flow through them.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    w_in, w_ln, w_bn = softmax(mean_weight_ptr)
    u_in, u_ln, u_bn = softmax(var_weight_ptr)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0) if AFFINE else tl.full((BC,), 1.0, tl.float32)
    per = samples // replicas
    dweight = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    for r in range(replicas):
        first = (r * per).to(tl.int64)
        mean_bn = tl.load(mean_RC_ptr + r * channels + c, mask=inside, other=0.0)[None, :]
        var_bn = tl.load(var_RC_ptr + r * channels + c, mask=inside, other=0.0)[None, :]
        dmean_bn = tl.zeros((BC,), tl.float32)
        dvar_bn = tl.zeros((BC,), tl.float32)
        for second in tl.static_range(2):  # first the sums over the samples, then what needs them
            sum_mu = tl.zeros((BN, BC), tl.float32)
            sum_var = tl.zeros((BN, BC), tl.float32)
            sum_weight = tl.zeros((BN, BC), tl.float32)
            sum_bias = tl.zeros((BN, BC), tl.float32)
            for start in range(0, per, BN):
                i = start + tl.arange(0, BN)
                known = i < per
                n = first + i
                valid = known[:, None] & inside[None, :]
                at = n[:, None] * channels + c[None, :]
                m = tl.load(mean_ptr + at, mask=valid, other=0.0)
                v = tl.load(var_ptr + at, mask=valid, other=0.0)
                mean_ln = tl.load(layer_ptr + n * 2, mask=known, other=0.0)[:, None]
                var_ln = tl.load(layer_ptr + n * 2 + 1, mask=known, other=0.0)[:, None]
                rstd = 1.0 / tl.sqrt(u_in * v + u_ln * var_ln + u_bn * var_bn + eps)
                dshift = tl.load(dshift_ptr + at, mask=valid, other=0.0)
                dscale = tl.load(dscale_ptr + at, mask=valid, other=0.0)
                dscale += dshift * (m - (w_in * m + w_ln * mean_ln + w_bn * mean_bn))
                dvar = tl.where(valid, -0.5 * rstd * rstd * rstd * weight[None, :] * dscale, 0.0)
                dmu = -weight[None, :] * rstd * dshift
                if second == 0:
                    sum_mu += dmu
                    sum_var += dvar
                    sum_weight += tl.where(valid, dscale * rstd, 0.0)
                    sum_bias += dshift
                else:
                    dmean_ln = tl.load(parts_ptr + n * 8, mask=known, other=0.0)[:, None] / channels
                    dvar_ln = tl.load(parts_ptr + n * 8 + 1, mask=known, other=0.0)[:, None] / channels
                    dv = u_in * dvar + dvar_ln + dvar_bn[None, :]
                    dm = w_in * dmu + dmean_ln + 2 * dvar_ln * (m - mean_ln)
                    dm += dmean_bn[None, :] + 2 * dvar_bn[None, :] * (m - mean_bn)
                    tl.store(slope_ptr + at, 2 * dv / length, mask=valid)
                    tl.store(offset_ptr + at, dm / length, mask=valid)
            if second == 0:
                dweight += tl.sum(sum_weight, 0)
                dbias += tl.sum(sum_bias, 0)
                if BATCH:
                    dmean_bn = w_bn * tl.sum(sum_mu, 0) / per
                    dvar_bn = u_bn * tl.sum(sum_var, 0) / per
    if AFFINE:
        tl.store(dweight_ptr + c, dweight, mask=inside)
        tl.store(dbias_ptr + c, dbias, mask=inside)
    if tl.program_id(0) == 0:
        softmax_gradient(parts_ptr + 2, dmean_weight_ptr, w_in, w_ln, w_bn, samples, BN)
        softmax_gradient(parts_ptr + 5, dvar_weight_ptr, u_in, u_ln, u_bn, samples, BN)


@triton.jit
def softmax_gradient(parts_ptr, to_ptr, a, b, c, samples, BN: tl.constexpr):
    """Sum the gradients of three ratios over the samples, and write those of their logits."""
    da = tl.zeros((BN,), tl.float32)
    db = tl.zeros((BN,), tl.float32)
    dc = tl.zeros((BN,), tl.float32)
    for start in range(0, samples, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        known = n < samples
        da += tl.load(parts_ptr + n * 8, mask=known, other=0.0)
        db += tl.load(parts_ptr + n * 8 + 1, mask=known, other=0.0)
        dc += tl.load(parts_ptr + n * 8 + 2, mask=known, other=0.0)
    sum_a = tl.sum(da, 0)
    sum_b = tl.sum(db, 0)
    sum_c = tl.sum(dc, 0)
    mean = a * sum_a + b * sum_b + c * sum_c
    tl.store(to_ptr, a * (sum_a - mean))
    tl.store(to_ptr + 1, b * (sum_b - mean))
    tl.store(to_ptr + 2, c * (sum_c - mean))


def serves(norm: Any) -> bool:
    """Whether these kernels support this layer: IN, LN and BN with one set of soft ratios, as in the paper."""
    plain = norm.normalizers == ("in", "ln", "bn") and norm.groups == 1 and not norm.hard and not norm.unbiased
    return plain and norm.num_features <= LARGEST and can_record(norm)


class Coefficients:
    """The launches of an SN for inputs of one shape.

    Args:
        replicas: the replicas of BN's scope; 1 if BN uses the running statistics.
        batch: whether BN's statistics are the batch's.
    """

    def __init__(self, samples: int, length: int, channels: int, replicas: int, batch: bool, affine: bool) -> None:
        self.samples = samples
        width = triton.next_power_of_2(channels)
        options = {"AFFINE": bool(affine), "BC": width, "num_warps": 8 if width > 2048 else 4}
        sizes = (samples // replicas, channels)
        self.forward_launch = Launch(forward_kernel, samples, sizes, **options)
        self.samples_launch = Launch(samples_kernel, samples, sizes, **options)
        blocks, sizes = triton.cdiv(channels, BLOCK["BC"]), (length, samples, replicas, channels)
        self.channels_launch = Launch(channels_kernel, blocks, sizes, BATCH=bool(batch), AFFINE=bool(affine), **BLOCK)

    def forward(self, norm: Any, mean_NC: Tensor, var_NC: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return scale_NC, shift_NC, and the tensors that the backward reads."""
        *affine, mean_weight, var_weight = learned
        mean_RC, var_RC = statistics_of_scope(norm, mean_NC, var_NC)
        scale_NC, shift_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        layer_N2 = mean_NC.new_empty((self.samples, 2))
        pair = affine or (mean_NC, mean_NC)
        results = (scale_NC, shift_NC, layer_N2)
        self.forward_launch(
            mean_NC, var_NC, mean_RC, var_RC, mean_weight, var_weight, *pair, *results, floats=(norm.eps,)
        )
        return scale_NC, shift_NC, mean_RC, var_RC, layer_N2

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
        *affine, mean_weight, var_weight = learned
        weight = affine[0] if affine else mean_NC
        parts = mean_NC.new_empty((self.samples, PARTS))
        self.samples_launch(*sums, *moments, *saved, mean_weight, var_weight, weight, parts, floats=(eps,))
        slope_NC, offset_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        gradients = [torch.empty_like(parameter) for parameter in learned]
        results = gradients if affine else (mean_NC, mean_NC, *gradients)
        self.channels_launch(
            *sums,
            *moments,
            *saved,
            parts,
            mean_weight,
            var_weight,
            weight,
            slope_NC,
            offset_NC,
            *results,
            floats=(eps,),
        )
        return slope_NC, offset_NC, *gradients


launches = functools.lru_cache(maxsize=1024)(Coefficients)


def key(norm: Any) -> tuple[int, ...]:
    """Return the options of a layer on which its launches depend."""
    batch = norm.uses_batch_statistics()
    return norm.num_features, norm.replicas if batch else 1, batch, norm.weight is not None


def saved_shapes(samples: int, channels: int, replicas: int, batch: int, affine: int) -> list[tuple[int, ...]]:
    """Return the shapes of what a forward saves."""
    return [*[(replicas, channels) if batch else (channels,)] * 2, (samples, 2)]


def coefficients(norm: Any, samples: int, length: int) -> Coefficients:
    """Return the launches of this layer for this number of samples and positions."""
    return launches(samples, length, *key(norm))
