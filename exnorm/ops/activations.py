"""Activations that the affine pass applies itself; their gradient is recomputed from the preactivation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function of the preactivation u.

    Attributes:
        module: the torch module that computes it, without options.
        apply_: act(u); may overwrite u.
        backward: (u, g) -> g * act'(u), the kernel behind torch's own gradient.
    """

    module: type[nn.Module]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _relu_(u: Tensor) -> Tensor:
    # torch.compile (2.11) gives a zero gradient if the output is overwritten in place.
    return torch.relu(u) if torch.compiler.is_compiling() else torch.relu_(u)


def through_relu(grad: Tensor, y: Tensor) -> Tensor:
    """Return the gradient at the input of a ReLU whose output is y."""
    return _aten.threshold_backward(grad, y, 0)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(nn.ReLU, _relu_, lambda u, grad: _aten.threshold_backward(grad, u, 0)),
    "relu6": Activation(nn.ReLU6, nn.functional.relu6, lambda u, grad: _aten.hardtanh_backward(grad, u, 0, 6)),
    "silu": Activation(nn.SiLU, nn.functional.silu, lambda u, grad: _aten.silu_backward(grad, u)),
    "hardswish": Activation(nn.Hardswish, nn.functional.hardswish, lambda u, grad: _aten.hardswish_backward(grad, u)),
    "gelu": Activation(nn.GELU, nn.functional.gelu, lambda u, grad: _aten.gelu_backward(grad, u)),
}
