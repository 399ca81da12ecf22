"""Pass 1: mean and biased variance of each (sample, channel).

Traffic: reads |x| once, writes 8 bytes for each (sample, channel). Grid: N x blocks of L x blocks of C. If one block
holds all positions, its result is final. Else `merge` combines the parts, in a fixed order: the variance of the whole
is the mean of the parts' variances plus the variance of their means. A part sums the differences from its first value.
So a mean far larger than the deviation costs no precision, unless the first value is an outlier.
"""

import triton
import triton.language as tl

from exnorm.ops.triton.tiles import offsets, place


@triton.jit
def moments(
    x_ptr, mean_ptr, var_ptr, length, channels, per, blocks_l, blocks_c,
    FINAL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """mean, var: (N, C) if FINAL; else the mean and the sum of squared deviations of each part, (N, blocks_l, C)."""
    n, part, block_c = place(blocks_c, blocks_l)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    x_ptr += n * length * channels
    first = part * per
    last = tl.minimum(first + per, length)
    lead = tl.load(
        x_ptr + offsets(first + tl.arange(0, 1), c, length, channels, ROWS, WIDE), mask=inside[None, :], other=0.0
    )
    lead = lead.to(tl.float32)
    total = tl.zeros((BL, BC), tl.float32)
    squares = tl.zeros((BL, BC), tl.float32)
    for start in range(first, last, BL):
        l = start + tl.arange(0, BL)
        valid = (l[:, None] < last) & inside[None, :]
        x = tl.load(x_ptr + offsets(l, c, length, channels, ROWS, WIDE), mask=valid, other=0.0).to(tl.float32)
        d = tl.where(valid, x - lead, 0.0)
        total += d
        squares += d * d
    count = (last - first).to(tl.float32)
    mean = tl.sum(total, 0) / count
    square = tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = (n * blocks_l + part) * channels + c
    tl.store(mean_ptr + at, tl.sum(lead, 0) + mean, mask=inside)
    tl.store(var_ptr + at, square / count if FINAL else square, mask=inside)


@triton.jit
def block_of_parts(start, parts, per, length, channels, c, inside, BP: tl.constexpr):
    """Return offsets, mask and number of positions of BP parts from `start` on."""
    part = start + tl.arange(0, BP)[:, None]
    count = tl.minimum(length - part * per, per).to(tl.float32)
    return part * channels + c[None, :], (part < parts) & inside[None, :], count


@triton.jit
def merge(
    part_mean_ptr, part_square_ptr, mean_ptr, var_ptr, length, channels, per, parts, blocks_c,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Combine the moments of the parts, BP at a time, into those of all positions. Grid: N x blocks of C."""
    n, _, block_c = place(blocks_c, 1)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    part_mean_ptr += n * parts * channels
    part_square_ptr += n * parts * channels
    lead = tl.load(part_mean_ptr + c, mask=inside, other=0.0)[None, :]
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        at, valid, count = block_of_parts(start, parts, per, length, channels, c, inside, BP)
        d = tl.load(part_mean_ptr + at, mask=valid, other=0.0) - lead
        total += tl.where(valid, d * count, 0.0)
    mean = lead + tl.sum(total, 0)[None, :] / length
    square = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        at, valid, count = block_of_parts(start, parts, per, length, channels, c, inside, BP)
        d = tl.load(part_mean_ptr + at, mask=valid, other=0.0) - mean
        within = tl.load(part_square_ptr + at, mask=valid, other=0.0)
        square += tl.where(valid, within + d * d * count, 0.0)
    tl.store(mean_ptr + n * channels + c, tl.sum(mean, 0), mask=inside)
    tl.store(var_ptr + n * channels + c, tl.sum(square, 0) / length, mask=inside)
