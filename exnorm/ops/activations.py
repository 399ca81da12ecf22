"""Activations that the affine pass applies itself; their gradient is recomputed from `a * x + b`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise function of u = a * x + b.

    Attributes:
        apply_: act(u); may overwrite u.
        backward_: (u, g) -> g * act'(u); may overwrite u.
    """

    apply_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


def _relu_(u: Tensor) -> Tensor:
    # torch 2.11 compiles an output that was overwritten to a zero gradient.
    return torch.relu(u) if torch.compiler.is_compiling() else torch.relu_(u)


def _relu_backward(u: Tensor, grad: Tensor) -> Tensor:
    # The kernel behind autograd's ReLU: zero where u <= 0, NaN where the gradient is NaN.
    return torch.ops.aten.threshold_backward(grad, u, 0)


ACTIVATIONS: dict[str, Activation] = {"relu": Activation(_relu_, _relu_backward)}
