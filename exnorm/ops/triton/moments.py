"""Pass 1: mean and biased variance of each (sample, channel).

Traffic: reads |x| once, writes 8 bytes for each (sample, channel). Grid: N x blocks of L x blocks of C. If one block
holds all positions, its result is final. Else `merge` combines the results of the parts by Chan's formula, in a fixed
order. A part sums the differences from its first value. So a mean far larger than the deviation costs no precision,
unless the first value is an outlier.
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
def merge(
    part_mean_ptr, part_square_ptr, mean_ptr, var_ptr, length, channels, per, parts, blocks_c, BC: tl.constexpr
):  # fmt: skip
    """Combine the moments of the parts into those of all positions. Grid: N x blocks of C."""
    n, _, block_c = place(blocks_c, 1)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    mean = tl.zeros((BC,), tl.float32)
    square = tl.zeros((BC,), tl.float32)
    for part in range(parts):
        at = (n * parts + part) * channels + c
        count = tl.minimum(length - part * per, per).to(tl.float32)
        done = (part * per).to(tl.float32)
        d = tl.load(part_mean_ptr + at, mask=inside, other=0.0) - mean
        mean += d * (count / (done + count))
        square += tl.load(part_square_ptr + at, mask=inside, other=0.0) + d * d * (done * count / (done + count))
    tl.store(mean_ptr + n * channels + c, mean, mask=inside)
    tl.store(var_ptr + n * channels + c, square / length, mask=inside)
