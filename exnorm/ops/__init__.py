"""The streaming primitives below every normalizer: per-(sample, channel) moments and one affine map.

    x : (N, C, *spatial) or (N, *spatial, C)
    m, v = moments(x)                 mean and biased variance over the L positions, (N, C)
    y = act(a * (x - m) + b + r)      a, b : (N, C), any differentiable function of m and v; r an optional residual

Together they take four passes over the big tensor (two forward, two backward) and save one tensor, `x`. Both numbers
are the same for any number of mixed normalizers. See `exnorm.ops.streaming` for the gradient.
"""

from exnorm.ops.activations import ACTIVATIONS, through_relu
from exnorm.ops.backend import BACKENDS, get_backend, implementation, is_exporting, set_backend, using_backend
from exnorm.ops.layout import expand_coefficients, length, spatial_dims, statistics_dtype
from exnorm.ops.streaming import affine, moments, needs_plain_autograd, sums

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "affine",
    "expand_coefficients",
    "get_backend",
    "implementation",
    "is_exporting",
    "length",
    "moments",
    "needs_plain_autograd",
    "set_backend",
    "spatial_dims",
    "statistics_dtype",
    "sums",
    "through_relu",
    "using_backend",
]
