"""The module that stands where a folded layer was."""

from typing import Any

from torch import Tensor, fx, nn

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.norms import Norm
from exnorm.norms.base import leaf


class Folded(nn.Module):
    """y = act(x + residual): what is left of a layer whose scale and shift are in the convolution before it.

    Args:
        norm: the layer that was folded. Its activation and its drop stay.
        into: the path of the convolution or linear layer.
        dimensions: the number of dimensions of an input whose channels are the convolution's; None for any number.

    Shape: the output has the shape of x, broadcast with the residual.

    Raises:
        ValueError: an input with another number of dimensions.
    """

    def __init__(self, norm: Norm, *, into: str, dimensions: int | None) -> None:
        super().__init__()
        self.original = norm.replaced or f"{type(norm).__module__}.{type(norm).__qualname__}"
        self.norm = type(norm).__name__
        self.into = into
        self.dimensions = dimensions
        self.fused_act = norm.fused_act
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return act(x + residual). It may overwrite x, which nobody else reads."""
        if isinstance(x, fx.Proxy):
            return leaf(self, x, residual)
        if self.dimensions not in (None, x.ndim):
            raise UserError(
                f"the {self.norm} folded into {self.into} takes inputs of {self.dimensions} dimensions, not "
                f"{tuple(x.shape)}; use the model that was not folded"
            )
        y = x if residual is None else x + residual
        y = y if self.fused_act is None else ops.ACTIVATIONS[self.fused_act].apply_(y)
        y = y if self.drop is None else self.drop(y)
        return y if self.act is None else self.act(y)

    def extra_repr(self) -> str:
        return self.norm + ("" if self.fused_act is None else f", act={self.fused_act!r}")
