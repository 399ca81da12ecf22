"""What normalizers that mix IN, LN and BN share: which ones, in which order, and where the ratios start."""

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

# The logit by which `initial` leads the others: exp(-10), about 5e-5, is left for each of them. Large enough to
# reproduce a pretrained network to four digits, small enough that the ratios can still move.
INITIAL_LEAD = 10.0


def check_normalizers(owner: str, normalizers: Sequence[str], initial: str | None) -> tuple[str, ...]:
    """The normalizers as a tuple.

    Raises:
        ValueError: none, an unknown or a repeated one, or an `initial` that is not among them.
    """
    names = tuple(normalizers)
    if not names or len(set(names)) != len(names) or not set(names) <= set(NORMALIZERS):
        raise UserError(
            f"{owner}: normalizers={list(names)} is not possible; allowed: some of {', '.join(NORMALIZERS)}, each once "
            "(norm.normalizers=[in,ln,bn])"
        )
    if initial is not None and initial not in names:
        raise UserError(
            f"{owner}: initial={initial!r} is not among normalizers={list(names)}; or null for equal ratios"
        )
    return names


def initial_logits(normalizers: Sequence[str], initial: str | None, base: float) -> Tensor:
    """(K,) logits: `base` for all, and INITIAL_LEAD more for `initial`."""
    return torch.tensor([base + (INITIAL_LEAD if name == initial else 0.0) for name in normalizers])


def mixed_statistics(module: BatchScopeNorm, normalizers: Sequence[str], moments: Moments) -> list[Statistics]:
    """The statistics of each normalizer, broadcastable to (N, C)."""
    scopes = {
        "in": instance_statistics,
        "ln": layer_statistics,
        "bn": module.batch_statistics,
    }
    return [scopes[name](moments) for name in normalizers]
