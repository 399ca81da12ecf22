"""The kinds of normalization layers that `convert` knows, and where a model has them.

Types are matched exactly: a swap by `isinstance(m, nn.BatchNorm2d)` would delete the activations that timm's
`BatchNormAct2d` carries.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import timm.layers
from timm.models import metaformer
from torch import nn

from exnorm.config.errors import UserError, suggest
from exnorm.norms import Norm

CHANNELS_LAST: dict[str, tuple[type[nn.Module], ...]] = {
    "layer": (
        nn.LayerNorm,
        timm.layers.LayerNorm,
        timm.layers.LayerNormFp32,
        timm.layers.LayerNormAct,
        timm.layers.LayerNormActFp32,
        metaformer.LayerNormNoBias,
    ),
    "rms": (
        nn.RMSNorm,
        timm.layers.RmsNorm,
        timm.layers.RmsNormFp32,
        timm.layers.RmsNormAct,
        timm.layers.RmsNormActFp32,
        timm.layers.SimpleNorm,
        timm.layers.SimpleNormFp32,
    ),
}
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        timm.layers.BatchNormAct2d,
        timm.layers.SyncBatchNormAct,
    ),
    "group": (
        nn.GroupNorm,
        timm.layers.GroupNorm,
        timm.layers.GroupNorm1,
        timm.layers.GroupNormAct,
        timm.layers.GroupNorm1Act,
        metaformer.GroupNorm1NoBias,
    ),
    "layer2d": (
        timm.layers.LayerNorm2d,
        timm.layers.LayerNorm2dFp32,
        timm.layers.LayerNormAct2d,
        timm.layers.LayerNormAct2dFp32,
        metaformer.LayerNorm2dNoBias,
    ),
    "layer": CHANNELS_LAST["layer"],
    "rms": (
        *CHANNELS_LAST["rms"],
        timm.layers.RmsNorm2d,
        timm.layers.RmsNorm2dFp32,
        timm.layers.RmsNormAct2d,
        timm.layers.RmsNormAct2dFp32,
        timm.layers.SimpleNorm2d,
        timm.layers.SimpleNorm2dFp32,
    ),
}
_KIND_OF = {cls: kind for kind, classes in KINDS.items() for cls in classes}
_KIND_OF_NAME = {f"{cls.__module__}.{cls.__qualname__}": kind for cls, kind in _KIND_OF.items()}


def normalization_layers(
    model: nn.Module,
) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    """Yield each known normalization layer as (parent, name, layer); a shared layer once per parent and name."""
    if kind_of(model) is not None:
        yield None, "", model
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and kind_of(child) is not None:
                yield parent, name, child


def kind_of(layer: nn.Module) -> str | None:
    """Return the kind of a known layer. For a layer that `convert` made, it is the kind of the layer it replaced."""
    return _KIND_OF_NAME.get(layer.replaced or "") if isinstance(layer, Norm) else _KIND_OF.get(type(layer))


def kept_layers(model: nn.Module, patterns: Sequence[str]) -> dict[nn.Module, str]:
    """Return the normalization layers whose names match one of these patterns, and for each the pattern.

    Raises:
        UserError: a pattern that matches no normalization layer.
    """
    if isinstance(patterns, str):
        raise UserError(f"keep={patterns!r} is not possible; give a tuple of patterns, such as ({patterns!r},)")
    named = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if kind_of(layer) is not None]
    kept: dict[nn.Module, str] = {}
    for pattern in patterns:
        found = [layer for name, layer in named if fnmatchcase(name, pattern)]
        if not found:
            near = suggest(pattern, [name for name, _ in named], count=3)
            raise UserError(f"keep={pattern} matches the name of no normalization layer; {near}")
        kept |= dict.fromkeys(found, pattern)
    return kept
