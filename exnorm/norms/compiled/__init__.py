"""Complete layers as compiled code: Triton kernels on a GPU, code of torch's inductor elsewhere.

`exnorm.norms` installs `normalize` into `exnorm.norms.base`, which itself has only the formula.
"""

from typing import Any

import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms.base import without_autocast
from exnorm.norms.compiled import layer
from exnorm.ops import plain


def normalize(norm: Any, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor | None:
    """Compute the result of `Norm.formula` with compiled code. Return None if there is no code for this call.

    There is none on the eager and the plain back end, if BN's scope spans several processes, under transformations such
    as those of `torch.func`, and under `torch.compile`, except for the Triton kernels. An exported program has the
    formula, which runs on other machines, too.
    """
    backend = ops.get_backend()
    if torch.compiler.is_compiling():
        if backend != "triton" or norm.scope()[1] is not None or ops.is_exporting() or plain.is_nested():
            return None
        from exnorm.norms.fused import operators

        return operators.normalize(norm, x, residual, act)
    if backend not in ("compiled", "triton") or not _is_plain_call(norm, x):
        return None
    if backend == "compiled":
        return without_autocast(layer.normalize, norm, x, residual, act)
    from exnorm.norms.fused import layer as fused  # imports Triton

    if fused.serves(norm, x):
        return fused.normalize(norm, x, residual, act)
    return None if x.device.type == "cpu" else without_autocast(layer.normalize, norm, x, residual, act)


def _is_plain_call(norm: Any, x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and norm.scope()[1] is None
        and not plain.is_transformed()
        and not torch._C._len_torch_dispatch_stack()
    )
