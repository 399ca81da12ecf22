"""Find out what the compiled coefficients of a layer depend on, and whether a layer can be compiled.

Two layers may run the same compiled code only if they agree in everything that the code assumes: the class, the
options, the mode, and the dtypes and shapes of their tensors. `momentum` is not one of these options. It is an input of
the code, so a schedule of `momentum` compiles nothing again.
"""

import enum
import functools
import types
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from exnorm.ops.guardless import warn_once

_NOT_PART_OF_THE_FORMULA = (
    "num_features",
    "replaced",
    "took_over",
    "adds_residual_of",
    "fused_act",
    "channel_dim",
    "momentum",
    "frozen",
    "not_folded",
)
_SET_BY_THE_TRAINING = ("training", "deferred", "replicas", "group")
_PLAIN = (
    types.NoneType,
    bool,
    int,
    float,
    str,
    torch.dtype,
    torch.device,
    type,
    enum.Enum,
    types.BuiltinFunctionType,
)
MOST_OPTIONS = 4  # sets of options that one layer object may have before it runs eagerly


def options_of(norm: Any) -> tuple[type, tuple[tuple[str, Hashable], ...], int]:
    """Return class, options and mode of a layer, as far as its coefficients may depend on them."""
    values = [(n, v) for n, v in norm.__dict__.items() if n[0] != "_" and n not in _NOT_PART_OF_THE_FORMULA]
    return type(norm), tuple(values), norm.scope()[0]


def tensors_of(norm: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that the coefficients read: the parameters, and the buffers together with `momentum`."""
    learned = {name: t for name, t in norm._parameters.items() if t is not None}
    buffers = {name: t for name, t in norm._buffers.items() if t is not None}
    momentum = getattr(norm, "momentum", None)
    if isinstance(momentum, float | int) and buffers:
        buffers["momentum"] = _scalar(float(momentum), next(iter(buffers.values())).device)
    return learned, buffers


@functools.lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def is_compilable(norm: Any) -> bool:
    """Whether `options_of` and `tensors_of` cover all that a layer's formula reads. Warn if they do not.

    A layer runs eagerly if it has tensors among its attributes (pruning, replicas of DataParallel), parametrizations,
    options that can change unnoticed, or options that change again and again.
    """
    own = [(n, v) for n, v in norm.__dict__.items() if n[0] != "_"]
    unknown = [n for n, v in own if n not in _SET_BY_THE_TRAINING and not _is_plain(v)]
    unknown += [n for n in norm._modules if n not in ("act", "drop")]
    if unknown:
        why = f"its attribute {unknown[0]!r} is not a number, string, tuple of these, parameter or buffer"
        warn_once(type(norm).__name__, ValueError(why))
        return False
    fixed = tuple([(n, v) for n, v in options_of(norm)[1] if n not in _SET_BY_THE_TRAINING])
    seen = _seen.setdefault(norm, [])
    if fixed in seen:
        return True
    if len(seen) == MOST_OPTIONS:
        changed = [name for name, value in fixed if (name, value) not in seen[-1]]
        why = f"its attribute {changed[0] if changed else '?'!r} changes while it runs; keep it in a buffer"
        warn_once(type(norm).__name__, ValueError(why))
        return False
    seen.append(fixed)
    return True


_seen: WeakKeyDictionary[Any, list[tuple[Any, ...]]] = WeakKeyDictionary()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) or (isinstance(value, types.FunctionType) and value.__closure__ is None)
