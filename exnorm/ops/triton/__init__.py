"""The streaming primitives on an NVIDIA GPU: one Triton kernel for each pass. Legend: see `exnorm.ops.eager`.

Inputs are dense (contiguous or channels last); other inputs are copied first. No kernel uses atomic additions, so
results are reproducible bit for bit. Importing this package imports Triton. If `TRITON_INTERPRET=1` is set before, the
kernels run on a CPU.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from exnorm.ops import eager
from exnorm.ops.layout import dense, like
from exnorm.ops.triton import sums as sums_kernels
from exnorm.ops.triton.affine import affine as affine_kernel
from exnorm.ops.triton.gradient import gradient as gradient_kernel
from exnorm.ops.triton.launch import INTERPRETED, Launch
from exnorm.ops.triton.moments import merge as merge_kernel
from exnorm.ops.triton.moments import moments as moments_kernel
from exnorm.ops.triton.tiles import Tile, merge_tile, positions_per_program, reduction_tile, streaming_tile

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether the kernels support this tensor; for others the eager formulas run."""
    return (x.is_cuda or INTERPRETED) and x.dtype in _DTYPES and x.numel() > 0


class _Shape(NamedTuple):
    """The sizes and the layout of an input, on which its launches depend."""

    samples: int
    length: int
    channels: int
    rows: bool  # whether the positions of a channel are contiguous


def _shape(x: Tensor, channel_dim: int) -> _Shape:
    samples, channels = x.shape[0], x.shape[channel_dim]
    length = x.numel() // (samples * channels)
    return _Shape(samples, length, channels, channel_dim == 1 and length > 1 and x.is_contiguous())


def _constants(shape: _Shape, tile: Tile) -> dict[str, Any]:
    """Return the constants that all passes share."""
    wide = shape.length * shape.channels >= 2**31
    return {"ROWS": shape.rows, "WIDE": wide, "BL": tile.positions, "BC": tile.channels, "num_warps": tile.warps}


class _Reduction(NamedTuple):
    """A pass that sums over L, and the launch that merges its partial results if there are several."""

    run: Launch
    parts: int
    merge: Launch | None


def _reduction(kernel: Any, merge: Any, shape: _Shape, **options: Any) -> _Reduction:
    samples, length, channels, rows = shape
    tile = reduction_tile(length, channels, rows=rows)
    per = positions_per_program(samples, length, channels, tile)
    parts, blocks = triton.cdiv(length, per), triton.cdiv(channels, tile.channels)
    if kernel is moments_kernel:
        options["FINAL"] = parts == 1
    run = Launch(
        kernel, samples * parts * blocks, (length, channels, per, parts, blocks), **options, **_constants(shape, tile)
    )
    if parts == 1:
        return _Reduction(run, 1, None)
    tile = merge_tile(parts)
    blocks = triton.cdiv(channels, tile.channels)
    sizes = (length, channels, per, parts, blocks) if kernel is moments_kernel else (channels, parts, blocks)
    sizes_of_tile = {"BP": tile.positions, "BC": tile.channels, "num_warps": tile.warps}
    return _Reduction(run, parts, Launch(merge, samples * blocks, sizes, **sizes_of_tile))


def _streaming(kernel: Any, shape: _Shape, **options: Any) -> Launch:
    samples, length, channels, rows = shape
    tile = streaming_tile(length, channels, rows=rows)
    blocks = (triton.cdiv(length, tile.positions), triton.cdiv(channels, tile.channels))
    programs = samples * blocks[0] * blocks[1]
    return Launch(kernel, programs, (length, channels, *blocks), **options, **_constants(shape, tile))


# Launches are cached by all that they depend on: a few dozen for a model, more for inputs of varying sizes. The dtype
# is part of the key because a launch checks the types of its tensors only once.
@functools.lru_cache(maxsize=4096)
def _moments_of(shape: _Shape, dtype: torch.dtype) -> _Reduction:
    return _reduction(moments_kernel, merge_kernel, shape)


@functools.lru_cache(maxsize=4096)
def _sums_of(shape: _Shape, dtype: torch.dtype, act: str | None, gate: bool) -> _Reduction:
    return _reduction(sums_kernels.sums, sums_kernels.merge, shape, GATE=gate, ACT=act or "none")


@functools.lru_cache(maxsize=4096)
def _affine_of(shape: _Shape, dtype: torch.dtype, act: str | None, residual: bool) -> Launch:
    return _streaming(affine_kernel, shape, RESIDUAL=residual, ACT=act or "none")


@functools.lru_cache(maxsize=4096)
def _gradient_of(shape: _Shape, dtype: torch.dtype, act: str | None, constant: bool) -> Launch:
    return _streaming(gradient_kernel, shape, CONSTANT=constant, ACT=act or "none")


def _two(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Allocate two float32 tensors for results."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    return torch.empty(shape, **options), torch.empty(shape, **options)


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    if not serves(x):
        return eager.moments(x, channel_dim)
    x = dense(x, channel_dim)
    shape = _shape(x, channel_dim)
    run, parts, merge = _moments_of(shape, x.dtype)
    mean_NC, var_NC = _two(x, shape.samples, shape.channels)
    if merge is None:
        run(x, mean_NC, var_NC)
    else:
        part_mean, part_square = _two(x, shape.samples, parts, shape.channels)
        run(x, part_mean, part_square)
        merge(part_mean, part_square, mean_NC, var_NC)
    return mean_NC, var_NC


def affine(
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """See `exnorm.ops.eager.affine`."""
    if not serves(x):
        return eager.affine(x, mean_NC, scale_NC, shift_NC, residual, channel_dim, act)
    x = dense(x, channel_dim)
    y = torch.empty_like(x)
    run = _affine_of(_shape(x, channel_dim), x.dtype, act, residual is not None)
    run(x, x if residual is None else like(residual, x), *_plain(mean_NC, scale_NC, shift_NC), y)
    return y


def affine_sums(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.affine_sums`."""
    if not serves(x):
        return eager.affine_sums(grad, x, mean_NC, scale_NC, shift_NC, channel_dim, act)
    x = dense(x, channel_dim)
    return _sums(like(grad, x), x, x, x, (mean_NC, scale_NC, shift_NC), channel_dim, act, gate=False)


def gated_sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `exnorm.ops.eager.gated_sums`."""
    if not serves(x):
        return eager.gated_sums(grad, x, y, mean_NC, scale_NC, shift_NC, channel_dim)
    x = dense(x, channel_dim)
    gated = torch.empty_like(x)
    coefficients = (mean_NC, scale_NC, shift_NC)
    return *_sums(like(grad, x), x, like(y, x), gated, coefficients, channel_dim, None, gate=True), gated


def _sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    gated: Tensor,
    coefficients: tuple[Tensor, ...],
    channel_dim: int,
    act: str | None,
    *,
    gate: bool,
) -> tuple[Tensor, Tensor]:
    shape = _shape(x, channel_dim)
    run, parts, merge = _sums_of(shape, x.dtype, act, gate)
    dscale_NC, dshift_NC = _two(x, shape.samples, shape.channels)
    tensors = (grad, x, y, gated, *_plain(*coefficients))
    if merge is None:
        run(*tensors, dscale_NC, dshift_NC)
    else:
        part_scale, part_shift = _two(x, shape.samples, parts, shape.channels)
        run(*tensors, part_scale, part_shift)
        merge(part_scale, part_shift, dscale_NC, dshift_NC)
    return dscale_NC, dshift_NC


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    scale_NC: Tensor,
    shift_NC: Tensor,
    slope_NC: Tensor | None,
    offset_NC: Tensor | None,
    channel_dim: int,
    act: str | None,
) -> Tensor:
    """See `exnorm.ops.eager.input_gradient`."""
    if not serves(x):
        return eager.input_gradient(grad, x, mean_NC, scale_NC, shift_NC, slope_NC, offset_NC, channel_dim, act)
    x = dense(x, channel_dim)
    dx = torch.empty_like(x)
    constant = slope_NC is None or offset_NC is None
    rest = (mean_NC, mean_NC) if slope_NC is None or offset_NC is None else (slope_NC, offset_NC)
    run = _gradient_of(_shape(x, channel_dim), x.dtype, act, constant)
    run(like(grad, x), x, *_plain(mean_NC, scale_NC, shift_NC, *rest), dx)
    return dx


def _plain(*coefficients: Tensor) -> list[Tensor]:
    """Return the coefficients as the kernels read them: float32 and contiguous."""
    return [
        c if c.dtype is torch.float32 and c.is_contiguous() else c.to(torch.float32).contiguous() for c in coefficients
    ]
