"""Raise an error where code of other packages would silently break a converted model."""

import functools
from typing import Any

from torch import nn

from exnorm.config.errors import UserError
from exnorm.norms import Norm

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
)
_FOLDING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm's `reparameterize_model` calls


def check_bare(model: nn.Module, verb: str) -> None:
    """Raise an error if a model or a part of it is wrapped."""
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            where = f"the submodule {name!r}" if name else "the model"
            raise UserError(
                f"{where} is wrapped in {type(module).__name__}; {verb} the bare model first (model.module), then wrap"
            )


def refuse_folding(model: nn.Module) -> None:
    """Make blocks that fold a batch normalization into a convolution raise an error if the norm is one of exnorm.

    Most normalizers are not a constant affine map. Also, a layer of exnorm may apply an activation or add a residual.
    So the folded block would compute another function.
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
        f"{method} would fold a batch normalization into a convolution, but exnorm's {norm} needs exnorm.fold; call "
        "that on the converted model, or reparameterize the model before you convert it"
    )
