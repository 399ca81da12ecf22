"""The activations of `exnorm.ops.activations` and their gradients inside a kernel, on float32 values."""

import triton
import triton.language as tl


@triton.jit
def activate(u, ACT: tl.constexpr):
    """act(u)."""
    if ACT == "relu":
        u = tl.where(u <= 0, 0.0, u)
    elif ACT == "relu6":
        u = tl.where(u <= 0, 0.0, tl.where(u >= 6, 6.0, u))
    elif ACT == "silu":
        u = u * tl.sigmoid(u)
    elif ACT == "hardswish":
        u = u * tl.where(u <= -3, 0.0, tl.where(u >= 3, 6.0, u + 3)) / 6
    elif ACT == "gelu":
        u = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    return u


@triton.jit
def through(u, g, ACT: tl.constexpr):
    """g * act'(u)."""
    if ACT == "relu":
        g = tl.where(u <= 0, 0.0, g)
    elif ACT == "relu6":
        g = tl.where((u <= 0) | (u >= 6), 0.0, g)
    elif ACT == "silu":
        s = tl.sigmoid(u)
        g = g * s * (1 + u * (1 - s))
    elif ACT == "hardswish":
        g = tl.where(u < -3, 0.0, tl.where(u <= 3, g * (u / 3 + 0.5), g))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        g = g * (cdf + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
    return g
