"""Pass 4: dx = scale * g + slope * (x - mean) + offset, where g is the gradient at the activation's input.

Traffic: reads |x| and the gradient, writes |dx|. Grid: N x blocks of L x blocks of C.
"""

import triton
import triton.language as tl

from exnorm.ops.triton.activations import through
from exnorm.ops.triton.tiles import offsets, place


@triton.jit
def gradient(
    grad_ptr, x_ptr, mean_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, dx_ptr,
    length, channels, blocks_l, blocks_c,
    CONSTANT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """CONSTANT: the coefficients depend on no input, so there is no slope and no offset."""
    n, block_l, block_c = place(blocks_c, blocks_l)
    l = block_l * BL + tl.arange(0, BL)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    valid = (l[:, None] < length) & inside[None, :]
    at = n * length * channels + offsets(l, c, length, channels, ROWS, WIDE)
    nc = n * channels + c
    mean = tl.load(mean_ptr + nc, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + nc, mask=inside, other=0.0)[None, :]
    shift = tl.load(shift_ptr + nc, mask=inside, other=0.0)[None, :]
    d = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) - mean
    g = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
    dx = through(d * scale + shift, g, ACT) * scale
    if not CONSTANT:
        slope = tl.load(slope_ptr + nc, mask=inside, other=0.0)[None, :]
        offset = tl.load(offset_ptr + nc, mask=inside, other=0.0)[None, :]
        dx += d * slope + offset
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=valid)
