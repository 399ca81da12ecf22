"""The streaming primitives on an NVIDIA GPU: one Triton kernel for each pass. Legend: see `exnorm.ops.eager`.

Inputs are dense, contiguous or channels last; another is copied first. No kernel adds atomically, so a result repeats
bit for bit. Importing this package imports Triton. `TRITON_INTERPRET=1`, set before, runs the kernels on a CPU.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from exnorm.ops import eager
from exnorm.ops.layout import dense, like
from exnorm.ops.triton.affine import affine as affine_kernel
from exnorm.ops.triton.gradient import gradient as gradient_kernel
from exnorm.ops.triton.moments import merge as merge_kernel
from exnorm.ops.triton.moments import moments as moments_kernel
from exnorm.ops.triton.sums import sums as sums_kernel
from exnorm.ops.triton.tiles import Tile, positions_per_program, reduction_tile, streaming_tile

INTERPRETED: bool = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether the kernels run on this tensor; the eager formulas run on others."""
    return (x.device.type == "cuda" or INTERPRETED) and x.dtype in _DTYPES and x.numel() > 0


class _Shape(NamedTuple):
    samples: int
    length: int
    channels: int
    rows: bool  # whether the positions of a channel are contiguous

    @classmethod
    def of(cls, x: Tensor, channel_dim: int) -> "_Shape":
        samples, channels = x.shape[0], x.shape[channel_dim]
        length = x.numel() // (samples * channels)
        return cls(samples, length, channels, channel_dim == 1 and length > 1 and x.is_contiguous())

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The options that all passes share."""
        wide = self.length * self.channels >= 2**31
        return {"ROWS": self.rows, "WIDE": wide, "BL": tile.positions, "BC": tile.channels, "num_warps": tile.warps}


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See `exnorm.ops.eager.moments`."""
    if not serves(x):
        return eager.moments(x, channel_dim)
    x = dense(x, channel_dim)
    shape = _Shape.of(x, channel_dim)
    n, length, c, rows = shape
    tile = reduction_tile(length, c, rows=rows)
    per = positions_per_program(n, length, c, tile)
    parts, blocks = triton.cdiv(length, per), triton.cdiv(c, tile.channels)
    first, second = x.new_empty((2, n, parts, c), dtype=torch.float32)
    moments_kernel[(n * parts * blocks,)](
        x, first, second, n, length, c, per, parts, blocks, FINAL=parts == 1, **shape.constants(tile)
    )
    if parts == 1:
        return first.view(n, c), second.view(n, c)
    mean_NC, var_NC = x.new_empty((2, n, c), dtype=torch.float32)
    blocks = triton.cdiv(c, 128)
    merge_kernel[(n * blocks,)](first, second, mean_NC, var_NC, length, c, per, parts, blocks, BC=128, num_warps=1)
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
    shape, tile, blocks = _streaming(x, channel_dim)
    coefficients = _plain(mean_NC, scale_NC, shift_NC)
    other = x if residual is None else like(residual, x)
    affine_kernel[(shape.samples * blocks[0] * blocks[1],)](
        x, other, *coefficients, y, shape.length, shape.channels, *blocks,
        RESIDUAL=residual is not None, ACT=act or "none", **shape.constants(tile),
    )  # fmt: skip
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
    return _sums(grad, x, None, (mean_NC, scale_NC, shift_NC), channel_dim, act)[:2]


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
    return _sums(grad, x, y, (mean_NC, scale_NC, shift_NC), channel_dim, None)


def _sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    coefficients: tuple[Tensor, ...],
    channel_dim: int,
    act: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x, channel_dim)
    grad = like(grad, x)
    gated = grad if y is None else torch.empty_like(x)
    shape = _Shape.of(x, channel_dim)
    n, length, c, rows = shape
    tile = reduction_tile(length, c, rows=rows)
    per = positions_per_program(n, length, c, tile)
    parts, blocks = triton.cdiv(length, per), triton.cdiv(c, tile.channels)
    both = x.new_empty((2, n, parts, c), dtype=torch.float32)
    sums_kernel[(n * parts * blocks,)](
        grad, x, x if y is None else like(y, x), gated, *_plain(*coefficients), both[0], both[1],
        length, c, per, parts, blocks, GATE=y is not None, ACT=act or "none", **shape.constants(tile),
    )  # fmt: skip
    dscale_NC, dshift_NC = both.view(2, n, c) if parts == 1 else both.sum(2)
    return dscale_NC, dshift_NC, gated


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
    grad, dx = like(grad, x), torch.empty_like(x)
    shape, tile, blocks = _streaming(x, channel_dim)
    constant = slope_NC is None or offset_NC is None
    rest = (mean_NC, mean_NC) if slope_NC is None or offset_NC is None else (slope_NC, offset_NC)
    gradient_kernel[(shape.samples * blocks[0] * blocks[1],)](
        grad, x, *_plain(mean_NC, scale_NC, shift_NC, *rest), dx, shape.length, shape.channels, *blocks,
        CONSTANT=constant, ACT=act or "none", **shape.constants(tile),
    )  # fmt: skip
    return dx


def _streaming(x: Tensor, channel_dim: int) -> tuple[_Shape, Tile, tuple[int, int]]:
    """The shape, the tile, and the number of its blocks along L and C."""
    shape = _Shape.of(x, channel_dim)
    tile = streaming_tile(shape.length, shape.channels, rows=shape.rows)
    blocks = (triton.cdiv(shape.length, tile.positions), triton.cdiv(shape.channels, tile.channels))
    return shape, tile, blocks


def _plain(*coefficients: Tensor) -> list[Tensor]:
    return [coefficient.contiguous() for coefficient in coefficients]
