"""Pass 3: sum_L g * (x - mean) and sum_L g, where g is the gradient at the activation's input.

Traffic: reads |x| and the gradient. If a residual and a ReLU follow (GATE), it also reads y, whose sign shows where the
ReLU is active. It then writes the gradient at the ReLU's input, which is also the residual's. Grid: N x blocks of L x
blocks of C. With several blocks of L, `merge` adds their sums in a fixed order.
"""

import triton
import triton.language as tl

from exnorm.ops.triton.activations import through
from exnorm.ops.triton.tiles import offsets, place


@triton.jit
def sums(
    grad_ptr, x_ptr, y_ptr, gated_ptr, mean_ptr, scale_ptr, shift_ptr, dscale_ptr, dshift_ptr,
    length, channels, per, blocks_l, blocks_c,
    GATE: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dscale, dshift: (N, blocks_l, C)."""
    n, part, block_c = place(blocks_c, blocks_l)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    sample = n * length * channels
    mean = tl.load(mean_ptr + n * channels + c, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + n * channels + c, mask=inside, other=0.0)[None, :]
    shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)[None, :]
    first = part * per
    last = tl.minimum(first + per, length)
    dscale = tl.zeros((BL, BC), tl.float32)
    dshift = tl.zeros((BL, BC), tl.float32)
    for start in range(first, last, BL):
        l = start + tl.arange(0, BL)
        valid = (l[:, None] < last) & inside[None, :]
        at = sample + offsets(l, c, length, channels, ROWS, WIDE)
        d = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) - mean
        g = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if GATE:
            y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            g = through(y, g, "relu")
            tl.store(gated_ptr + at, g.to(gated_ptr.dtype.element_ty), mask=valid)
        else:
            g = through(d * scale + shift, g, ACT)
        dscale += tl.where(valid, g * d, 0.0)
        dshift += tl.where(valid, g, 0.0)
    at = (n * blocks_l + part) * channels + c
    tl.store(dscale_ptr + at, tl.sum(dscale, 0), mask=inside)
    tl.store(dshift_ptr + at, tl.sum(dshift, 0), mask=inside)


@triton.jit
def merge(
    part_scale_ptr, part_shift_ptr, dscale_ptr, dshift_ptr, channels, parts, blocks_c,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add the sums of the parts, BP at a time: (N, C). Grid: N x blocks of C."""
    n, _, block_c = place(blocks_c, 1)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    dscale = tl.zeros((BP, BC), tl.float32)
    dshift = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        part = start + tl.arange(0, BP)
        valid = (part[:, None] < parts) & inside[None, :]
        at = (n * parts + part[:, None]) * channels + c[None, :]
        dscale += tl.load(part_scale_ptr + at, mask=valid, other=0.0)
        dshift += tl.load(part_shift_ptr + at, mask=valid, other=0.0)
    tl.store(dscale_ptr + n * channels + c, tl.sum(dscale, 0), mask=inside)
    tl.store(dshift_ptr + n * channels + c, tl.sum(dshift, 0), mask=inside)
