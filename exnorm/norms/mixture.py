"""Shared code of the normalizers that mix IN, LN and BN: their names, their order, and the initial ratios."""

from collections.abc import Sequence

import torch
from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.statistics import (
    Moments,
    Statistics,
    instance_statistics,
    layer_statistics,
)

NORMALIZERS = ("in", "ln", "bn")  # the order of the published SN code

# The logit of `initial` minus the others'. Each of those gets a ratio of exp(-10), about 5e-5. It is large enough to
# reproduce a pretrained network to four digits, and small enough that the ratios can still be learned.
INITIAL_LEAD = 10.0


def check_normalizers(owner: str, normalizers: Sequence[str], initial: str | None) -> tuple[str, ...]:
    """Return the normalizers as a tuple.

    Raises:
        ValueError: no normalizer, an unknown or a repeated one, or an `initial` that is not among them.
    """
    names = tuple(normalizers)
    if not names or len(set(names)) != len(names) or not set(names) <= set(NORMALIZERS):
        raise UserError(
            f"{owner}: normalizers={list(names)} is not possible; allowed: some of {', '.join(NORMALIZERS)}, each once "
            "(norm.normalizers=[in,ln,bn])"
        )
    if initial is not None and initial not in names:
        raise UserError(
            f"{owner}: initial={initial!r} is not among normalizers={list(names)}; give one of them, or null for "
            "equal ratios"
        )
    return names


def initial_logits(normalizers: Sequence[str], initial: str | None, base: float) -> Tensor:
    """Return (K,) logits: `base` for all, and INITIAL_LEAD more for `initial`."""
    return torch.tensor([base + (INITIAL_LEAD if name == initial else 0.0) for name in normalizers])


def mixed_statistics(module: BatchScopeNorm, normalizers: Sequence[str], moments: Moments) -> list[Statistics]:
    """The statistics of each normalizer, broadcastable to (N, C)."""
    scopes = {
        "in": instance_statistics,
        "ln": layer_statistics,
        "bn": module.batch_statistics,
    }
    return [scopes[name](moments) for name in normalizers]
