"""The coefficients of GN, and so of LN (one group) and IN (C groups), on a GPU: one launch forward, two backward.

    scale = weight * r,   shift = bias + scale * (m - mu),   r = (var + eps)^-1/2
    with s = dscale + dshift * (m - mu):   dvar = -1/2 r^3 sum_c weight * s,   dmu = -r * sum_c weight * dshift

`statistics` and `input` have one program per sample and block of groups; `parameters` has one per block of channels.
Legend: N batch, C channels, G groups of D = C / G channels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exnorm.norms.fused.scope import BLOCK
from exnorm.norms.group_norm import GroupNorm
from exnorm.norms.layer_norm import LayerNorm
from exnorm.ops.triton.launch import Launch

LARGEST = 8192  # the largest D: a program holds so many values of each tensor

PARAMETERS = ("weight", "bias")  # in the order of `learned`


@triton.jit
def tile(groups, width, BG: tl.constexpr, BD: tl.constexpr):
    """Return the sample of this program, its groups, their channels (BG, BD), and which of these exist."""
    blocks = tl.cdiv(groups, BG)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    g = (tl.program_id(0) % blocks) * BG + tl.arange(0, BG)
    d = tl.arange(0, BD)
    c = g[:, None] * width + d[None, :]
    return n, g, c, (g[:, None] < groups) & (d[None, :] < width)


@triton.jit
def statistics(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_NG_ptr, rstd_NG_ptr, eps, groups, width,
    AFFINE: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """scale, shift: (N, C); mean_NG, rstd_NG: (N, G)."""
    n, g, c, valid = tile(groups, width, BG, BD)
    at = n * groups * width + c
    m = tl.load(mean_ptr + at, mask=valid, other=0.0)
    v = tl.load(var_ptr + at, mask=valid, other=0.0)
    mu = (tl.sum(m, 1) / width)[:, None]
    d = tl.where(valid, m - mu, 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(v + d * d, 1) / width + eps))[:, None]
    weight = tl.load(weight_ptr + c, mask=valid, other=0.0) if AFFINE else tl.full((BG, BD), 1.0, tl.float32)
    bias = tl.load(bias_ptr + c, mask=valid, other=0.0) if AFFINE else tl.zeros((BG, BD), tl.float32)
    scale = weight * rstd
    tl.store(scale_ptr + at, scale, mask=valid)
    tl.store(shift_ptr + at, bias + scale * d, mask=valid)
    tl.store(mean_NG_ptr + n * groups + g, tl.sum(mu, 1), mask=g < groups)
    tl.store(rstd_NG_ptr + n * groups + g, tl.sum(rstd, 1), mask=g < groups)


@triton.jit
def input(  # noqa: A001  # the gradient of the input
    dscale_ptr, dshift_ptr, mean_ptr, weight_ptr, mean_NG_ptr, rstd_NG_ptr, slope_ptr, offset_ptr,
    length, groups, width,
    AFFINE: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """slope = 2 dv / L and offset = dm / L, (N, C)."""
    n, g, c, valid = tile(groups, width, BG, BD)
    at = n * groups * width + c
    mu = tl.load(mean_NG_ptr + n * groups + g, mask=g < groups, other=0.0)[:, None]
    rstd = tl.load(rstd_NG_ptr + n * groups + g, mask=g < groups, other=0.0)[:, None]
    weight = tl.load(weight_ptr + c, mask=valid, other=0.0) if AFFINE else tl.full((BG, BD), 1.0, tl.float32)
    d = tl.where(valid, tl.load(mean_ptr + at, mask=valid, other=0.0) - mu, 0.0)
    dshift = tl.load(dshift_ptr + at, mask=valid, other=0.0)
    dscale = tl.load(dscale_ptr + at, mask=valid, other=0.0) + dshift * d
    dvar = (tl.sum(tl.where(valid, dscale * weight, 0.0), 1) / width)[:, None] * -0.5 * rstd * rstd * rstd
    dmu = (tl.sum(tl.where(valid, dshift * weight, 0.0), 1) / width)[:, None] * -rstd
    tl.store(slope_ptr + at, tl.broadcast_to(2 * dvar / length, (BG, BD)), mask=valid)
    tl.store(offset_ptr + at, (dmu + 2 * dvar * d) / length, mask=valid)


@triton.jit
def parameters(
    dscale_ptr, dshift_ptr, mean_ptr, mean_NG_ptr, rstd_NG_ptr, dweight_ptr, dbias_ptr, samples, groups, width,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dweight = sum_n r * (dscale + dshift * (m - mu)) and dbias = sum_n dshift, (C,)."""
    channels = groups * width
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    dweight = tl.zeros((BN, BC), tl.float32)
    dbias = tl.zeros((BN, BC), tl.float32)
    for start in range(0, samples, BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        valid = (n[:, None] < samples) & inside[None, :]
        at = n[:, None] * channels + c[None, :]
        group = n[:, None] * groups + (c // width)[None, :]
        d = tl.load(mean_ptr + at, mask=valid, other=0.0) - tl.load(mean_NG_ptr + group, mask=valid, other=0.0)
        dshift = tl.load(dshift_ptr + at, mask=valid, other=0.0)
        dscale = tl.load(dscale_ptr + at, mask=valid, other=0.0) + dshift * d
        dweight += dscale * tl.load(rstd_NG_ptr + group, mask=valid, other=0.0)
        dbias += dshift
    tl.store(dweight_ptr + c, tl.sum(dweight, 0), mask=inside)
    tl.store(dbias_ptr + c, tl.sum(dbias, 0), mask=inside)


def serves(norm: Any) -> bool:
    """Whether these kernels support this layer."""
    return norm.num_features // groups_of(norm) <= LARGEST


def groups_of(norm: Any) -> int:
    """Return the number of groups: GN's own number, 1 for LN, C for IN."""
    if isinstance(norm, GroupNorm):
        return norm.num_groups
    return 1 if isinstance(norm, LayerNorm) else norm.num_features


class Coefficients:
    """The launches of a GN, LN or IN for inputs of one shape."""

    def __init__(self, samples: int, length: int, groups: int, width: int, affine: bool) -> None:
        self.shape = (samples, groups)
        columns = triton.next_power_of_2(width)
        block = max(1, min(triton.next_power_of_2(groups), 1024 // columns))
        programs = samples * triton.cdiv(groups, block)
        options = {"AFFINE": bool(affine), "BG": block, "BD": columns, "num_warps": 8 if columns > 2048 else 4}
        blocks = triton.cdiv(groups * width, BLOCK["BC"])
        self.statistics = Launch(statistics, programs, (groups, width), **options)
        self.input = Launch(input, programs, (length, groups, width), **options)
        self.parameters = Launch(parameters, blocks, (samples, groups, width), **BLOCK)

    def forward(self, norm: Any, mean_NC: Tensor, var_NC: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return scale_NC, shift_NC, and the tensors that the backward reads."""
        scale_NC, shift_NC = torch.empty_like(mean_NC), torch.empty_like(mean_NC)
        mean_NG, rstd_NG = mean_NC.new_empty(self.shape), mean_NC.new_empty(self.shape)
        pair = learned or (mean_NC, mean_NC)
        self.statistics(mean_NC, var_NC, *pair, scale_NC, shift_NC, mean_NG, rstd_NG, floats=(norm.eps,))
        return scale_NC, shift_NC, mean_NG, rstd_NG

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
        self.input(*sums, mean_NC, learned[0] if learned else mean_NC, *saved, slope_NC, offset_NC)
        if learned:
            self.parameters(*sums, mean_NC, *saved, *gradients)
        return slope_NC, offset_NC, *gradients


launches = functools.lru_cache(maxsize=1024)(Coefficients)


def key(norm: Any) -> tuple[int, ...]:
    """Return the options of a layer on which its launches depend."""
    groups = groups_of(norm)
    return groups, norm.num_features // groups, norm.weight is not None


def saved_shapes(samples: int, groups: int, width: int, affine: int) -> list[tuple[int, ...]]:
    """Return the shapes of what a forward saves."""
    return [(samples, groups)] * 2


def coefficients(norm: Any, samples: int, length: int) -> Coefficients:
    """Return the launches of this layer for this number of samples and positions."""
    return launches(samples, length, *key(norm))
