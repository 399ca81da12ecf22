"""Pass 2: y = act(scale * (x - mean) + shift + residual).

Traffic: reads |x| and the residual, if there is one; writes |y|. Grid: N x blocks of L x blocks of C.
"""

import triton
import triton.language as tl

from exnorm.ops.triton.activations import activate
from exnorm.ops.triton.tiles import offsets, place


@triton.jit
def affine(
    x_ptr, residual_ptr, mean_ptr, scale_ptr, shift_ptr, y_ptr, length, channels, blocks_l, blocks_c,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x, residual, y: (N, L, C) or, with ROWS, (N, C, L); mean, scale, shift: (N, C)."""
    n, block_l, block_c = place(blocks_c, blocks_l)
    l = block_l * BL + tl.arange(0, BL)
    c = block_c * BC + tl.arange(0, BC)
    inside = c < channels
    valid = (l[:, None] < length) & inside[None, :]
    at = offsets(l, c, length, channels, ROWS, WIDE)
    sample = n * length * channels
    x = tl.load(x_ptr + sample + at, mask=valid, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + n * channels + c, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + n * channels + c, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + n * channels + c, mask=inside, other=0.0)[None, :]
    if RESIDUAL:  # added to the shift first: in the other order ptxas spills registers for sm_80
        shift = shift + tl.load(residual_ptr + sample + at, mask=valid, other=0.0).to(tl.float32)
    u = (x - mean[None, :]) * scale[None, :] + shift
    tl.store(y_ptr + sample + at, activate(u, ACT).to(y_ptr.dtype.element_ty), mask=valid)
