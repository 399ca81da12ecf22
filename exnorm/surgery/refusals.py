"""What others would do to a converted model silently wrong, and is refused instead."""

import functools
from typing import Any

from torch import nn

from exnorm.config.errors import UserError
from exnorm.norms import Norm

_FOLDING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm's `reparameterize_model` calls


def refuse_folding(model: nn.Module) -> None:
    """Let blocks that fold a batch normalization into a convolution refuse it where the norm is one of exnorm.

    Most normalizers are no constant affine map, and a layer of exnorm may apply an activation or add a residual; what a
    block computes from its running statistics would be another function.
    """
    for path, module in model.named_modules():
        inside = [child for child in module.modules() if isinstance(child, Norm)]
        if not inside or isinstance(module, Norm):
            continue
        for method in _FOLDING:
            if callable(getattr(module, method, None)):
                module.__dict__[method] = functools.partial(_refuse, f"{path}.{method}", type(inside[0]).__name__)


def _refuse(method: str, norm: str, *args: Any, **kwargs: Any) -> None:
    raise UserError(
        f"{method} would fold a batch normalization into a convolution, and there is a {norm} of exnorm, which cannot "
        "be folded; use the converted model as it is, or reparameterize the model before it is converted"
    )
