"""EN's coefficients on a GPU: two launches forward, two backward. See `exnorm.norms.exemplar_norm`.

    scale = sum_k lam_k weight_k r_k,   shift = sum_k lam_k (bias_k + weight_k h_k),   h_k = (m - mu_k) r_k  (IN: 0)
    z_k = conv(h_k),   lam = softmax(fc2 act(fc1 vec(z z^T)))

Forward: first BN's statistics (`scope.batch_statistics`). Then one program per sample, which holds all its channels,
computes LN's statistics, the ratio branch and the coefficients.

Backward: `samples_kernel` has one program per sample. It goes back through the ratio branch, and writes dz and what the
gradients of the fully connected layers need. `gradients_kernel` has one program per block of channels, which goes back
through the statistics and writes all gradients that have channels, and one per block of hidden units, which sums the
gradients of the two layers over the samples. Both take 6 microseconds with 8 samples on an H200, so they run at once.

Legend: N batch, C channels, R replicas of N / R samples, Z = C / r outputs of the convolution of r channels each,
H hidden units. Order of the normalizers: in, ln, bn. z z^T has six different entries: ii il ib ll lb bb.
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

PARAMETERS = (  # in the order of `learned`
    "weight",
    "bias",
    "conv_weight",
    "conv_bias",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
)


@triton.jit
def rows(
    mean_ptr, mean_bn_ptr, var_bn_ptr, conv_weight_ptr, conv_bias_ptr, mean_ln, rstd_ln, eps, outputs, width,
    BZ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Return z of IN (the bias), of LN and of BN, (BZ,) each; 0 beyond the outputs."""
    z = tl.arange(0, BZ)
    c = z[:, None] * width + tl.arange(0, BR)[None, :]
    valid = (z[:, None] < outputs) & (tl.arange(0, BR)[None, :] < width)
    m = tl.load(mean_ptr + c, mask=valid, other=0.0)
    kernel = tl.load(conv_weight_ptr + c, mask=valid, other=0.0)
    mean_bn = tl.load(mean_bn_ptr + c, mask=valid, other=0.0)
    rstd_bn = 1.0 / tl.sqrt(tl.load(var_bn_ptr + c, mask=valid, other=1.0) + eps)
    bias = tl.load(conv_bias_ptr + z, mask=z < outputs, other=0.0)
    z_ln = tl.sum((m - mean_ln) * rstd_ln * kernel, 1) + bias
    z_bn = tl.sum(tl.where(valid, (m - mean_bn) * rstd_bn * kernel, 0.0), 1) + bias
    return bias, z_ln, z_bn


@triton.jit
def hidden_units(fc1_weight_ptr, fc1_bias_ptr, ii, il, ib, ll, lb, bb, hidden, TANH: tl.constexpr, BH: tl.constexpr):
    """act(fc1 vec(z z^T)), (BH,)."""
    h = tl.arange(0, BH)
    known = h < hidden
    at = fc1_weight_ptr + h * 9
    t = tl.load(fc1_bias_ptr + h, mask=known, other=0.0)
    t += tl.load(at, mask=known, other=0.0) * ii
    t += (tl.load(at + 1, mask=known, other=0.0) + tl.load(at + 3, mask=known, other=0.0)) * il
    t += (tl.load(at + 2, mask=known, other=0.0) + tl.load(at + 6, mask=known, other=0.0)) * ib
    t += tl.load(at + 4, mask=known, other=0.0) * ll
    t += (tl.load(at + 5, mask=known, other=0.0) + tl.load(at + 7, mask=known, other=0.0)) * lb
    t += tl.load(at + 8, mask=known, other=0.0) * bb
    if TANH:
        t = 2 * tl.sigmoid(2 * t) - 1
    else:
        t = tl.where(t <= 0, 0.0, t)
    return tl.where(known, t, 0.0)


@triton.jit
def forward_kernel(
    mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, weight_ptr, bias_ptr, conv_weight_ptr, conv_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, scale_ptr, shift_ptr, sample_ptr,
    eps, per, channels, outputs, width, hidden, step,
    TANH: tl.constexpr, BZ: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """scale, shift: (N, C); sample: (N, 5), three ratios, LN's mean, LN's 1 / deviation. Grid: N.

    step: the distance from one normalizer's weights to the next one's: C, or 0 if all share them.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    mean_ptr += n * channels
    mean_RC_ptr += n // per * channels
    var_RC_ptr += n // per * channels
    m = tl.load(mean_ptr + c, mask=inside, other=0.0)
    v = tl.load(var_ptr + n * channels + c, mask=inside, other=0.0)
    mean_ln = tl.sum(m, 0) / channels
    d = tl.where(inside, m - mean_ln, 0.0)
    rstd_ln = 1.0 / tl.sqrt(tl.sum(v + d * d, 0) / channels + eps)
    z_in, z_ln, z_bn = rows(
        mean_ptr, mean_RC_ptr, var_RC_ptr, conv_weight_ptr, conv_bias_ptr, mean_ln, rstd_ln, eps, outputs, width, BZ, BR
    )
    t = hidden_units(
        fc1_weight_ptr, fc1_bias_ptr, tl.sum(z_in * z_in, 0), tl.sum(z_in * z_ln, 0), tl.sum(z_in * z_bn, 0),
        tl.sum(z_ln * z_ln, 0), tl.sum(z_ln * z_bn, 0), tl.sum(z_bn * z_bn, 0), hidden, TANH, BH,
    )  # fmt: skip
    h = tl.arange(0, BH)
    known = h < hidden
    a = tl.sum(tl.load(fc2_weight_ptr + h, mask=known, other=0.0) * t, 0) + tl.load(fc2_bias_ptr)
    b = tl.sum(tl.load(fc2_weight_ptr + hidden + h, mask=known, other=0.0) * t, 0) + tl.load(fc2_bias_ptr + 1)
    e = tl.sum(tl.load(fc2_weight_ptr + 2 * hidden + h, mask=known, other=0.0) * t, 0) + tl.load(fc2_bias_ptr + 2)
    top = tl.maximum(a, tl.maximum(b, e))
    a = tl.exp(a - top)
    b = tl.exp(b - top)
    e = tl.exp(e - top)
    total = a + b + e
    lam_in = a / total
    lam_ln = b / total
    lam_bn = e / total
    mean_bn = tl.load(mean_RC_ptr + c, mask=inside, other=0.0)
    rstd_bn = 1.0 / tl.sqrt(tl.load(var_RC_ptr + c, mask=inside, other=1.0) + eps)
    scale_ln = lam_ln * tl.load(weight_ptr + step + c, mask=inside, other=0.0) * rstd_ln
    scale_bn = lam_bn * tl.load(weight_ptr + 2 * step + c, mask=inside, other=0.0) * rstd_bn
    scale = lam_in * tl.load(weight_ptr + c, mask=inside, other=0.0) / tl.sqrt(v + eps) + scale_ln + scale_bn
    shift = lam_in * tl.load(bias_ptr + c, mask=inside, other=0.0)
    shift += lam_ln * tl.load(bias_ptr + step + c, mask=inside, other=0.0) + scale_ln * d
    shift += lam_bn * tl.load(bias_ptr + 2 * step + c, mask=inside, other=0.0) + scale_bn * (m - mean_bn)
    tl.store(scale_ptr + n * channels + c, scale, mask=inside)
    tl.store(shift_ptr + n * channels + c, shift, mask=inside)
    sample_ptr += n * 5
    tl.store(sample_ptr, lam_in)
    tl.store(sample_ptr + 1, lam_ln)
    tl.store(sample_ptr + 2, lam_bn)
    tl.store(sample_ptr + 3, mean_ln)
    tl.store(sample_ptr + 4, rstd_ln)


@triton.jit
def samples_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, sample_ptr, weight_ptr, bias_ptr,
    conv_weight_ptr, conv_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
    dz_ptr, units_ptr, small_ptr, eps, per, channels, outputs, width, hidden, step,
    TANH: tl.constexpr, BZ: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid: N.

    dz: (N, 3, Z). units: (N, 2, H), the hidden units and the gradients at the input of their activation. small:
    (N, 11), the six products of z, three gradients of logits, and dmu and dvar of LN.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    mean_ptr += n * channels
    mean_RC_ptr += n // per * channels
    var_RC_ptr += n // per * channels
    lam_in = tl.load(sample_ptr + n * 5)
    lam_ln = tl.load(sample_ptr + n * 5 + 1)
    lam_bn = tl.load(sample_ptr + n * 5 + 2)
    mean_ln = tl.load(sample_ptr + n * 5 + 3)
    rstd_ln = tl.load(sample_ptr + n * 5 + 4)
    m = tl.load(mean_ptr + c, mask=inside, other=0.0)
    v = tl.load(var_ptr + n * channels + c, mask=inside, other=0.0)
    dscale = tl.load(dscale_ptr + n * channels + c, mask=inside, other=0.0)
    dshift = tl.load(dshift_ptr + n * channels + c, mask=inside, other=0.0)
    weight_in = tl.load(weight_ptr + c, mask=inside, other=0.0)
    weight_ln = tl.load(weight_ptr + step + c, mask=inside, other=0.0)
    weight_bn = tl.load(weight_ptr + 2 * step + c, mask=inside, other=0.0)
    mean_bn = tl.load(mean_RC_ptr + c, mask=inside, other=0.0)
    rstd_bn = 1.0 / tl.sqrt(tl.load(var_RC_ptr + c, mask=inside, other=1.0) + eps)
    d_ln = tl.where(inside, m - mean_ln, 0.0)
    # the ratios' gradients, then their logits'
    of_in = tl.sum(
        dscale * weight_in / tl.sqrt(tl.where(inside, v, 1.0) + eps)
        + dshift * tl.load(bias_ptr + c, mask=inside, other=0.0),
        0,
    )
    of_ln = dscale * weight_ln * rstd_ln
    of_ln += dshift * (tl.load(bias_ptr + step + c, mask=inside, other=0.0) + weight_ln * d_ln * rstd_ln)
    of_bn = dscale * weight_bn * rstd_bn
    of_bn += dshift * (tl.load(bias_ptr + 2 * step + c, mask=inside, other=0.0) + weight_bn * (m - mean_bn) * rstd_bn)
    dlam_ln = tl.sum(of_ln, 0)
    dlam_bn = tl.sum(of_bn, 0)
    average = lam_in * of_in + lam_ln * dlam_ln + lam_bn * dlam_bn
    da = lam_in * (of_in - average)
    db = lam_ln * (dlam_ln - average)
    de = lam_bn * (dlam_bn - average)
    # the ratio branch again, then back through it
    z_in, z_ln, z_bn = rows(
        mean_ptr, mean_RC_ptr, var_RC_ptr, conv_weight_ptr, conv_bias_ptr, mean_ln, rstd_ln, eps, outputs, width, BZ, BR
    )
    ii = tl.sum(z_in * z_in, 0)
    il = tl.sum(z_in * z_ln, 0)
    ib = tl.sum(z_in * z_bn, 0)
    ll = tl.sum(z_ln * z_ln, 0)
    lb = tl.sum(z_ln * z_bn, 0)
    bb = tl.sum(z_bn * z_bn, 0)
    t = hidden_units(fc1_weight_ptr, fc1_bias_ptr, ii, il, ib, ll, lb, bb, hidden, TANH, BH)
    h = tl.arange(0, BH)
    known = h < hidden
    dt = tl.load(fc2_weight_ptr + h, mask=known, other=0.0) * da
    dt += tl.load(fc2_weight_ptr + hidden + h, mask=known, other=0.0) * db
    dt += tl.load(fc2_weight_ptr + 2 * hidden + h, mask=known, other=0.0) * de
    if TANH:
        dt *= 1 - t * t
    else:
        dt = tl.where(t <= 0, 0.0, dt)
    at = fc1_weight_ptr + h * 9
    dii = tl.sum(tl.load(at, mask=known, other=0.0) * dt, 0)
    dil = tl.sum((tl.load(at + 1, mask=known, other=0.0) + tl.load(at + 3, mask=known, other=0.0)) * dt, 0)
    dib = tl.sum((tl.load(at + 2, mask=known, other=0.0) + tl.load(at + 6, mask=known, other=0.0)) * dt, 0)
    dll = tl.sum(tl.load(at + 4, mask=known, other=0.0) * dt, 0)
    dlb = tl.sum((tl.load(at + 5, mask=known, other=0.0) + tl.load(at + 7, mask=known, other=0.0)) * dt, 0)
    dbb = tl.sum(tl.load(at + 8, mask=known, other=0.0) * dt, 0)
    dz_in = 2 * dii * z_in + dil * z_ln + dib * z_bn
    dz_ln = dil * z_in + 2 * dll * z_ln + dlb * z_bn
    dz_bn = dib * z_in + dlb * z_ln + 2 * dbb * z_bn
    z = tl.arange(0, BZ)
    dz_ptr += n * 3 * outputs
    tl.store(dz_ptr + z, dz_in, mask=z < outputs)
    tl.store(dz_ptr + outputs + z, dz_ln, mask=z < outputs)
    tl.store(dz_ptr + 2 * outputs + z, dz_bn, mask=z < outputs)
    tl.store(units_ptr + n * 2 * hidden + h, t, mask=known)
    tl.store(units_ptr + n * 2 * hidden + hidden + h, dt, mask=known)
    # LN: the map (dh = lam weight dshift) and the convolution (dh = kernel dz) read its statistics
    part = z[:, None] * width + tl.arange(0, BR)[None, :]
    valid = (z[:, None] < outputs) & (tl.arange(0, BR)[None, :] < width)
    dh = tl.load(conv_weight_ptr + part, mask=valid, other=0.0) * dz_ln[:, None]
    d_part = tl.where(valid, tl.load(mean_ptr + part, mask=valid, other=0.0) - mean_ln, 0.0)
    dh_map = lam_ln * weight_ln * dshift
    total = tl.sum(dh_map, 0) + tl.sum(tl.sum(dh, 1), 0)
    drstd = tl.sum(lam_ln * weight_ln * dscale + dh_map * d_ln, 0) + tl.sum(tl.sum(dh * d_part, 1), 0)
    small_ptr += n * 11
    tl.store(small_ptr, ii)
    tl.store(small_ptr + 1, il)
    tl.store(small_ptr + 2, ib)
    tl.store(small_ptr + 3, ll)
    tl.store(small_ptr + 4, lb)
    tl.store(small_ptr + 5, bb)
    tl.store(small_ptr + 6, da)
    tl.store(small_ptr + 7, db)
    tl.store(small_ptr + 8, de)
    tl.store(small_ptr + 9, -rstd_ln * total)
    tl.store(small_ptr + 10, -0.5 * rstd_ln * rstd_ln * rstd_ln * drstd)


@triton.jit
def of_channels(
    block, dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, sample_ptr, dz_ptr, small_ptr,
    weight_ptr, conv_weight_ptr, slope_ptr, offset_ptr, dweight_ptr, dbias_ptr, dconv_weight_ptr, dconv_bias_ptr,
    eps, length, samples, replicas, channels, outputs, width, step,
    BATCH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """slope = 2 dv / L, offset = dm / L, (N, C), and the gradients of weight, bias and convolution, of BC channels.

    BATCH: BN's statistics are the batch's, so gradients flow through them.
    """
    c = block * BC + tl.arange(0, BC)
    inside = c < channels
    weight_in = tl.load(weight_ptr + c, mask=inside, other=0.0)[None, :]
    weight_ln = tl.load(weight_ptr + step + c, mask=inside, other=0.0)[None, :]
    weight_bn = tl.load(weight_ptr + 2 * step + c, mask=inside, other=0.0)[None, :]
    kernel = tl.load(conv_weight_ptr + c, mask=inside, other=0.0)[None, :]
    per = samples // replicas
    dweight_in = tl.zeros((BN, BC), tl.float32)
    dweight_ln = tl.zeros((BN, BC), tl.float32)
    dweight_bn = tl.zeros((BN, BC), tl.float32)
    dbias_in = tl.zeros((BN, BC), tl.float32)
    dbias_ln = tl.zeros((BN, BC), tl.float32)
    dbias_bn = tl.zeros((BN, BC), tl.float32)
    dkernel = tl.zeros((BN, BC), tl.float32)
    dconv_bias = tl.zeros((BN, BC), tl.float32)
    for r in range(replicas):
        first = (r * per).to(tl.int64)
        mean_bn = tl.load(mean_RC_ptr + r * channels + c, mask=inside, other=0.0)[None, :]
        rstd_bn = 1.0 / tl.sqrt(tl.load(var_RC_ptr + r * channels + c, mask=inside, other=1.0) + eps)[None, :]
        dmean_bn = tl.zeros((1, BC), tl.float32)
        dvar_bn = tl.zeros((1, BC), tl.float32)
        for second in tl.static_range(2):  # first the sums over the samples, then what needs them
            sum_dh = tl.zeros((BN, BC), tl.float32)
            sum_drstd = tl.zeros((BN, BC), tl.float32)
            for start in range(0, per, BN):
                i = start + tl.arange(0, BN)
                known = i < per
                n = first + i
                valid = known[:, None] & inside[None, :]
                at = n[:, None] * channels + c[None, :]
                z = n[:, None] * 3 * outputs + (c // width)[None, :]
                lam_in = tl.load(sample_ptr + n * 5, mask=known, other=0.0)[:, None]
                lam_ln = tl.load(sample_ptr + n * 5 + 1, mask=known, other=0.0)[:, None]
                lam_bn = tl.load(sample_ptr + n * 5 + 2, mask=known, other=0.0)[:, None]
                mean_ln = tl.load(sample_ptr + n * 5 + 3, mask=known, other=0.0)[:, None]
                rstd_ln = tl.load(sample_ptr + n * 5 + 4, mask=known, other=0.0)[:, None]
                m = tl.load(mean_ptr + at, mask=valid, other=0.0)
                v = tl.load(var_ptr + at, mask=valid, other=1.0)
                rstd_in = 1.0 / tl.sqrt(v + eps)
                dscale = tl.load(dscale_ptr + at, mask=valid, other=0.0)
                dshift = tl.load(dshift_ptr + at, mask=valid, other=0.0)
                dz_ln = tl.load(dz_ptr + z + outputs, mask=valid, other=0.0)
                dz_bn = tl.load(dz_ptr + z + 2 * outputs, mask=valid, other=0.0)
                dh_bn = lam_bn * weight_bn * dshift + kernel * dz_bn
                if second == 0:
                    h_ln = (m - mean_ln) * rstd_ln
                    h_bn = (m - mean_bn) * rstd_bn
                    dweight_in += lam_in * dscale * rstd_in
                    dweight_ln += lam_ln * (dscale * rstd_ln + dshift * h_ln)
                    dweight_bn += lam_bn * (dscale * rstd_bn + dshift * h_bn)
                    dbias_in += lam_in * dshift
                    dbias_ln += lam_ln * dshift
                    dbias_bn += lam_bn * dshift
                    dkernel += h_ln * dz_ln + h_bn * dz_bn
                    dconv_bias += tl.load(dz_ptr + z, mask=valid, other=0.0) + dz_ln + dz_bn
                    sum_dh += dh_bn
                    sum_drstd += lam_bn * weight_bn * dscale + dh_bn * (m - mean_bn)
                else:
                    dmean_ln = tl.load(small_ptr + n * 11 + 9, mask=known, other=0.0)[:, None] / channels
                    dvar_ln = tl.load(small_ptr + n * 11 + 10, mask=known, other=0.0)[:, None] / channels
                    dh_ln = lam_ln * weight_ln * dshift + kernel * dz_ln
                    scale = lam_in * weight_in * rstd_in + lam_ln * weight_ln * rstd_ln + lam_bn * weight_bn * rstd_bn
                    dv = -0.5 * rstd_in * rstd_in * rstd_in * lam_in * weight_in * dscale + dvar_ln + dvar_bn
                    dm = dh_ln * rstd_ln + dmean_ln + 2 * dvar_ln * (m - mean_ln) - scale * dshift
                    dm += dh_bn * rstd_bn + dmean_bn + 2 * dvar_bn * (m - mean_bn)
                    tl.store(slope_ptr + at, 2 * dv / length, mask=valid)
                    tl.store(offset_ptr + at, dm / length, mask=valid)
            if (second == 0) and BATCH:
                dmean_bn = -rstd_bn * tl.sum(sum_dh, 0)[None, :] / per
                dvar_bn = -0.5 * rstd_bn * rstd_bn * rstd_bn * tl.sum(sum_drstd, 0)[None, :] / per
    if step == 0:
        tl.store(dweight_ptr + c, tl.sum(dweight_in + dweight_ln + dweight_bn, 0), mask=inside)
        tl.store(dbias_ptr + c, tl.sum(dbias_in + dbias_ln + dbias_bn, 0), mask=inside)
    else:
        tl.store(dweight_ptr + c, tl.sum(dweight_in, 0), mask=inside)
        tl.store(dweight_ptr + step + c, tl.sum(dweight_ln, 0), mask=inside)
        tl.store(dweight_ptr + 2 * step + c, tl.sum(dweight_bn, 0), mask=inside)
        tl.store(dbias_ptr + c, tl.sum(dbias_in, 0), mask=inside)
        tl.store(dbias_ptr + step + c, tl.sum(dbias_ln, 0), mask=inside)
        tl.store(dbias_ptr + 2 * step + c, tl.sum(dbias_bn, 0), mask=inside)
    tl.store(dconv_weight_ptr + c, tl.sum(dkernel, 0), mask=inside)
    tl.store(dconv_bias_ptr + c // width, tl.sum(dconv_bias, 0), mask=inside & (c % width == 0))


@triton.jit
def of_layers(
    block, units_ptr, small_ptr, dfc1_weight_ptr, dfc1_bias_ptr, dfc2_weight_ptr, dfc2_bias_ptr, samples, hidden,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of the two fully connected layers, of BC hidden units."""
    h = block * BC + tl.arange(0, BC)
    inside = h < hidden
    known_j = tl.arange(0, 16)
    # which of the six products each entry of vec(z z^T) is: 0 1 2, 1 3 4, 2 4 5
    entry = tl.where(known_j < 3, known_j, tl.where(known_j == 3, 1, tl.where(known_j == 4, 3, 4)))
    entry = tl.where(known_j == 6, 2, tl.where(known_j == 8, 5, entry))
    dfc1_bias = tl.zeros((BN, BC), tl.float32)
    a = tl.zeros((BN, BC), tl.float32)
    b = tl.zeros((BN, BC), tl.float32)
    e = tl.zeros((BN, BC), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    sums_b = tl.zeros((BN,), tl.float32)
    sums_e = tl.zeros((BN,), tl.float32)
    for start in range(0, samples, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        known = n < samples
        valid = known[:, None] & inside[None, :]
        t = tl.load(units_ptr + n[:, None] * 2 * hidden + h[None, :], mask=valid, other=0.0)
        da = tl.load(small_ptr + n * 11 + 6, mask=known, other=0.0)
        db = tl.load(small_ptr + n * 11 + 7, mask=known, other=0.0)
        de = tl.load(small_ptr + n * 11 + 8, mask=known, other=0.0)
        a += t * da[:, None]
        b += t * db[:, None]
        e += t * de[:, None]
        sums += da
        sums_b += db
        sums_e += de
        dfc1_bias += tl.load(units_ptr + (n[:, None] * 2 + 1) * hidden + h[None, :], mask=valid, other=0.0)
    tl.store(dfc1_bias_ptr + h, tl.sum(dfc1_bias, 0), mask=inside)
    tl.store(dfc2_weight_ptr + h, tl.sum(a, 0), mask=inside)
    tl.store(dfc2_weight_ptr + hidden + h, tl.sum(b, 0), mask=inside)
    tl.store(dfc2_weight_ptr + 2 * hidden + h, tl.sum(e, 0), mask=inside)
    if block == 0:
        tl.store(dfc2_bias_ptr, tl.sum(sums, 0))
        tl.store(dfc2_bias_ptr + 1, tl.sum(sums_b, 0))
        tl.store(dfc2_bias_ptr + 2, tl.sum(sums_e, 0))
    for j in range(9):
        product = tl.sum(tl.where(known_j == j, entry, 0), 0)
        total = tl.zeros((BN, BC), tl.float32)
        for start in range(0, samples, BN):
            n = (start + tl.arange(0, BN)).to(tl.int64)
            known = n < samples
            valid = known[:, None] & inside[None, :]
            dt = tl.load(units_ptr + (n[:, None] * 2 + 1) * hidden + h[None, :], mask=valid, other=0.0)
            total += dt * tl.load(small_ptr + n * 11 + product, mask=known, other=0.0)[:, None]
        tl.store(dfc1_weight_ptr + h * 9 + j, tl.sum(total, 0), mask=inside)


@triton.jit
def gradients_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, sample_ptr, dz_ptr, units_ptr, small_ptr,
    weight_ptr, conv_weight_ptr, slope_ptr, offset_ptr, dweight_ptr, dbias_ptr, dconv_weight_ptr, dconv_bias_ptr,
    dfc1_weight_ptr, dfc1_bias_ptr, dfc2_weight_ptr, dfc2_bias_ptr,
    eps, length, samples, replicas, channels, outputs, width, hidden, step, blocks_h,
    BATCH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients that sum over the samples, of the channels and of the layers at the same time.

    Grid: `blocks_h` blocks of H, then blocks of C.
    """
    block = tl.program_id(0)
    if block < blocks_h:
        of_layers(
            block, units_ptr, small_ptr, dfc1_weight_ptr, dfc1_bias_ptr, dfc2_weight_ptr, dfc2_bias_ptr,
            samples, hidden, BN, BC,
        )  # fmt: skip
    else:
        of_channels(
            block - blocks_h, dscale_ptr, dshift_ptr, mean_ptr, var_ptr, mean_RC_ptr, var_RC_ptr, sample_ptr, dz_ptr,
            small_ptr, weight_ptr, conv_weight_ptr, slope_ptr, offset_ptr, dweight_ptr, dbias_ptr, dconv_weight_ptr,
            dconv_bias_ptr, eps, length, samples, replicas, channels, outputs, width, step, BATCH, BN, BC,
        )  # fmt: skip


def serves(norm: Any) -> bool:
    """Whether these kernels support this layer: IN, LN and BN, with the convolution and its bias, as in the paper."""
    plain = norm.normalizers == ("in", "ln", "bn") and norm.conv_bias is not None and norm.weight is not None
    return plain and norm.num_features <= LARGEST and can_record(norm)


class Coefficients:
    """The launches of an EN for inputs of one shape.

    Args:
        outputs, width: the convolution has Z = `outputs` outputs, which read `width` channels each.
        step: the distance from one normalizer's weights to the next one's: C, or 0 if all share them.
        replicas: the replicas of BN's scope; 1 if BN uses the running statistics.
        batch: whether BN's statistics are the batch's.
    """

    def __init__(
        self,
        samples: int,
        length: int,
        outputs: int,
        width: int,
        hidden: int,
        step: int,
        tanh: bool,
        replicas: int,
        batch: bool,
    ) -> None:
        channels = outputs * width
        self.samples, self.outputs, self.hidden = samples, outputs, hidden
        columns = triton.next_power_of_2(channels)
        options = {
            "TANH": bool(tanh),
            "BZ": triton.next_power_of_2(outputs),
            "BR": triton.next_power_of_2(width),
            "BC": columns,
            "BH": triton.next_power_of_2(hidden),
            "num_warps": 8 if columns > 1024 else 4,
        }
        sizes = (samples // replicas, channels, outputs, width, hidden, step)
        self.forward_launch = Launch(forward_kernel, samples, sizes, **options)
        self.samples_launch = Launch(samples_kernel, samples, sizes, **options)
        blocks_h, blocks_c = triton.cdiv(hidden, BLOCK["BC"]), triton.cdiv(channels, BLOCK["BC"])
        sizes = (length, samples, replicas, channels, outputs, width, hidden, step, blocks_h)
        self.gradients_launch = Launch(gradients_kernel, blocks_h + blocks_c, sizes, BATCH=bool(batch), **BLOCK)

    def forward(self, norm: Any, mean_NC: Tensor, var_NC: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return scale_NC, shift_NC, and the tensors that the backward reads."""
        mean_RC, var_RC = statistics_of_scope(norm, mean_NC, var_NC)
        scale_NC, shift_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        sample_N5 = mean_NC.new_empty((self.samples, 5))
        results = (scale_NC, shift_NC, sample_N5)
        self.forward_launch(mean_NC, var_NC, mean_RC, var_RC, *learned, *results, floats=(norm.eps,))
        return scale_NC, shift_NC, mean_RC, var_RC, sample_N5

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
        dz = mean_NC.new_empty((self.samples, 3, self.outputs))
        units = mean_NC.new_empty((self.samples, 2, self.hidden))
        small = mean_NC.new_empty((self.samples, 11))
        self.samples_launch(*sums, *moments, *saved, *learned[:7], dz, units, small, floats=(eps,))
        slope_NC, offset_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        gradients = [torch.empty_like(parameter) for parameter in learned]
        scratch, results = (dz, units, small), (slope_NC, offset_NC, *gradients)
        read = (*sums, *moments, *saved, *scratch, learned[0], learned[2])
        self.gradients_launch(*read, *results, floats=(eps,))
        return results


launches = functools.lru_cache(maxsize=1024)(Coefficients)


def key(norm: Any) -> tuple[int, ...]:
    """Return the options of a layer on which its launches depend."""
    outputs = norm.num_features // norm.reduction
    step = 0 if norm.shared_affine else norm.num_features
    hidden = norm.pi * len(norm.normalizers)
    batch = norm.uses_batch_statistics()
    tanh, replicas = norm.hidden_act == "tanh", norm.replicas if batch else 1
    return outputs, norm.reduction, hidden, step, tanh, replicas, batch


def saved_shapes(
    samples: int, outputs: int, width: int, hidden: int, step: int, tanh: int, replicas: int, batch: int
) -> list[tuple[int, ...]]:
    """Return the shapes of what a forward saves."""
    channels = outputs * width
    return [*[(replicas, channels) if batch else (channels,)] * 2, (samples, 5)]


def coefficients(norm: Any, samples: int, length: int) -> Coefficients:
    """Return the launches of this layer for this number of samples and positions."""
    return launches(samples, length, *key(norm))
