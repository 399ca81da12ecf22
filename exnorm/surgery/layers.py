"""Put a normalizer into any model: replace its normalization layers, and report what was replaced."""

import importlib
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import timm.layers
import torch
import torchvision
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options, is_class, is_own, option_values
from exnorm.norms import BatchScopeNorm, Norm
from exnorm.surgery.audit_rows import FOLDED, Audit, AuditRow
from exnorm.surgery.folded import Folded
from exnorm.surgery.kinds import CHANNELS_LAST, KINDS, kept_layers, kind_of, normalization_layers
from exnorm.surgery.meta import HOOKS
from exnorm.surgery.pairs import activation_name, following_activations
from exnorm.surgery.refusals import check_bare, refuse_folding
from exnorm.surgery.residuals import fuse_residuals

_FROZEN = (torchvision.ops.FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d)
_UNFREEZE = (
    "its statistics are frozen; convert the model before it is frozen, or call timm.layers.unfreeze_batch_norm_2d"
)
_SYNCHRONIZED = (nn.SyncBatchNorm, timm.layers.SyncBatchNormAct)


def norm_class(norm: str | type[Norm]) -> type[Norm]:
    """Return the class of a normalizer from its short name, a file name in `conf/norm`. A class is returned unchanged.

    Raises:
        ValueError: an unknown name, or a class that is not a subclass of `Norm`.
    """
    names = group_options("norm")
    if not isinstance(norm, str):
        return _checked(norm, f"convert takes a subclass of exnorm.norms.Norm, or a name: {', '.join(names)}")
    if norm not in names and not is_class("norm", norm):
        raise UserError(f"unknown norm {norm!r}; allowed: {', '.join(names)}")
    target: str = option_values("norm", norm)["_target_"]
    module, _, name = target.rpartition(".")
    advice = "give the full name of a subclass of exnorm.norms.Norm"
    advice += "" if is_class("norm", norm) else f" as _target_ in norm/{norm}.yaml"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise UserError(f"norm {norm!r}: its _target_ {target!r} cannot be imported ({problem}); {advice}") from problem
    return _checked(found, advice)


def _checked(cls: Any, advice: str) -> type[Norm]:
    if not (isinstance(cls, type) and issubclass(cls, Norm)):
        raise UserError(f"{cls!r} is not a normalizer of exnorm; {advice}")
    return cls


def convert(
    model: nn.Module,
    norm: str | type[Norm] = "en",
    *,
    replace: Sequence[str] = ("batch",),
    keep: Sequence[str] = (),
    fuse: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace a model's normalization layers in place and return the model. Call it before you build the optimizer.

    The new layers keep the affine and running values (also zero-initialised weights), device, dtype, mode,
    `requires_grad`, and the activation and drop of norm-act layers. A layer that two modules share stays one layer.
    With `norm="bn"` the model's function does not change. With `initial="bn"` (SN, EN), a pretrained network with BN
    starts as that network: each layer gives the other normalizers a weight of only 1e-4 in total. A layer that
    `convert` made is treated like the layer that it replaced. If its class stays the same, its ratios are kept too.

    Args:
        norm: a short name (see `exnorm list norms`) or a subclass of `Norm`.
        replace: the kinds to replace: batch, group, layer2d, layer, rms. `layer` and `rms` normalize each token on its
            own, and no normalizer of exnorm does. So replacing them changes the function.
        keep: patterns of the names of layers that stay as they are, such as `head.*` (`fnmatch`; `*` matches dots,
            too). The full name has to match. A kept batch normalization stays torch's: see `docs/limitations.md` for
            what that means in training with replicas, several passes or several processes.
        fuse: apply activations inside the affine pass: those of norm-act layers, and those that follow a layer if
            `exnorm.surgery.pairs` proves it. The activation's module then becomes an `nn.Identity`. The pass also adds
            residuals if `exnorm.surgery.residuals` proves the addition. The class of such a block becomes a subclass.
        options: keyword options of the normalizer's constructor.

    Raises:
        ValueError: an unknown norm, kind or option, a pattern that matches no layer, a wrapped model, or nothing to
            replace. The model is unchanged.
    """
    cls = norm_class(norm)
    if isinstance(norm, str) and not is_class("norm", norm) and not is_own("norm", norm):
        options = changed_options(option_values("norm", norm), constructor_options(cls)) | options
    _check_request(model, cls, replace, options)
    kept = kept_layers(model, keep)
    places = [place for place in normalization_layers(model) if kind_of(place[2]) in replace and place[2] not in kept]
    if not places:
        if kept:
            raise UserError(f"nothing to replace: keep={','.join(keep)} keeps every layer of kind {'/'.join(replace)}")
        raise UserError(f"nothing to replace: there is no layer of kind {'/'.join(replace)}; {_what_there_is(model)}")
    single = [child for _, _, child in places if _has_no_activation(child)]
    followers = following_activations(model, single) if fuse else {}
    like = next(model.parameters(), None)  # for layers without parameters and buffers
    # All layers are built before the first is replaced, so an error leaves the model unchanged.
    built: dict[int, Norm] = {}
    for _, _, child in places:
        if id(child) not in built:
            act = _fused_activation(child, followers) if fuse or isinstance(child, Norm) else None
            built[id(child)] = _replacement(child, cls, act, like, options)
    for parent, name, child in places:
        if parent is None:
            return built[id(child)]
        parent._modules[name] = built[id(child)]
    _take_over(model, {act: built[id(norm)] for norm, act in followers.items()})
    if fuse:
        fuse_residuals(model)
    refuse_folding(model)
    for layer, pattern in kept.items():
        vars(layer)["kept_by"] = pattern
    timm.layers.register_notrace_module(cls)
    return model


def _what_there_is(model: nn.Module) -> str:
    present = Counter(kind_of(child) for _, _, child in normalization_layers(model))
    text = f"this model's kinds: {', '.join(f'{kind} ({count})' for kind, count in present.items()) or 'none'}"
    frozen = [type(module).__name__ for module in model.modules() if type(module) in _FROZEN]
    return text + (f"; {frozen[0]} ({len(frozen)}): {_UNFREEZE}" if frozen else "")


def audit(model: nn.Module) -> Audit:
    """List every normalization layer of a model: what `convert` replaced, what it left, and why.

    After `fold`, also: which layers were folded, and why the others were not.
    """
    rows = Audit()
    for name, module in model.named_modules():
        kind = kind_of(module)
        original = f"{type(module).__module__}.{type(module).__qualname__}"
        if isinstance(module, Norm):
            note = module.replaced
            new = f"{type(module).__name__}({module.extra_repr()})"
            fused = (
                f"the residual of {module.adds_residual_of}" if module.adds_residual_of else "",
                f"the activation of {module.took_over}" if module.took_over else "",
            )
            reasons = ("replaced" if note else "built", " and ".join(filter(None, fused)))
            reason = ", with ".join(filter(None, reasons))
            reason += f"; not folded: {module.not_folded}" if module.not_folded else ""
            rows.append(AuditRow(name, note or original, new, reason))
        elif isinstance(module, Folded):
            new = f"Folded({module.extra_repr()})"
            rows.append(AuditRow(name, module.original, new, f"{FOLDED} {module.into}"))
        elif kind is not None:
            pattern = vars(module).get("kept_by")
            asked = f"kind {kind!r} was not asked for (replace=({kind!r},))"
            rows.append(AuditRow(name, original, None, f"kept by keep={pattern}" if pattern else asked))
        elif type(module) in _FROZEN:
            rows.append(AuditRow(name, original, None, _UNFREEZE))
        elif "norm" in type(module).__name__.lower() and _is_layer(module):
            rows.append(AuditRow(name, original, None, "not a known normalization layer"))
    return rows


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is more than a container: it has no submodules, or it has parameters or buffers of its own."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own) or next(module.children(), None) is None


def _check_request(model: nn.Module, cls: type[Norm], replace: Sequence[str], options: dict[str, Any]) -> None:
    check_bare(model, "convert")
    if isinstance(replace, str) or not set(replace) <= set(KINDS):
        raise UserError(f"replace={replace!r} is not possible; allowed: a tuple of {', '.join(KINDS)}")
    allowed = constructor_options(cls)
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise UserError(f"{cls.__name__} has no option {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")


def constructor_options(cls: type[Norm]) -> dict[str, Any]:
    """Return the keyword options of a normalizer's constructor and its base classes, with their defaults."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(name, parameter.default)
    return found


def changed_options(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults. For others, such as eps, each layer keeps its own value."""
    given = {key: value for key, value in values.items() if key not in ("name", "_target_")}
    return {key: value for key, value in given.items() if key not in defaults or value != defaults[key]}


def _num_features(layer: nn.Module) -> int:
    for attribute in ("num_features", "num_channels", "normalized_shape"):
        value = getattr(layer, attribute, None)
        if value is not None:
            if isinstance(value, int):
                return value
            if len(value) == 1:
                return int(value[0])
            raise UserError(
                f"a {type(layer).__name__} normalizes over the last {len(value)} dimensions, so it has no channel "
                "dimension and cannot be replaced; leave its kind out of replace"
            )
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.shape[0]


def _has_no_activation(layer: nn.Module) -> bool:
    return getattr(layer, "fused_act", None) is None and all(
        isinstance(getattr(layer, name, None), nn.Identity | None) for name in ("act", "drop")
    )


def _fused_activation(layer: nn.Module, followers: dict[nn.Module, nn.Module]) -> str | None:
    """Return the activation that the new layer applies itself: the layer's own, or the one that follows it."""
    if layer in followers:
        return activation_name(followers[layer])
    if isinstance(layer, Norm):
        return layer.fused_act
    own_is_last = isinstance(getattr(layer, "drop", None), nn.Identity | None)
    return activation_name(getattr(layer, "act", None)) if own_is_last else None


def _take_over(model: nn.Module, norms: dict[nn.Module, Norm]) -> None:
    """Replace each activation by an `nn.Identity`, and store its path in its norm."""
    for path, module in model.named_modules():
        if module in norms:
            norms[module].took_over = path
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in norms:
                parent._modules[name] = nn.Identity()


def _replacement(
    layer: nn.Module, cls: type[Norm], act: str | None, fallback: Tensor | None, options: dict[str, Any]
) -> Norm:
    inherited = _inherited(layer, cls, fallback)
    new = cls(
        _num_features(layer),
        **{**inherited, **options, **({} if act is None else {"act": act})},
    )
    if act is None:
        for name in ("drop", "act"):
            post = getattr(layer, name, None)
            setattr(new, name, None if isinstance(post, nn.Identity) else post)
    _carry_over(layer, new)
    new.__dict__.update((name, value) for name, value in vars(layer).items() if name.startswith(HOOKS))
    new.replaced = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, Norm):
        for name in ("replaced", "took_over", "adds_residual_of", "frozen"):
            setattr(new, name, getattr(layer, name))
        if type(layer) is cls and options.get("initial") is None:
            own = {**dict(new.named_parameters(recurse=False)), **dict(new.named_buffers(recurse=False))}
            same = {k: v for k, v in layer.state_dict().items() if k in own and own[k].shape == v.shape}
            new.load_state_dict(same, strict=False)
    return new.train(layer.training)


def _inherited(layer: nn.Module, cls: type[Norm], fallback: Tensor | None) -> dict[str, Any]:
    """Return the options that the new layer takes from the layer that it replaces."""
    weight, running_mean = (getattr(layer, name, None) for name in ("weight", "running_mean"))
    like = next((tensor for tensor in (weight, running_mean, fallback) if tensor is not None), None)
    inherited: dict[str, Any] = {
        "eps": layer.eps if layer.eps is not None else 1e-5,
        "affine": weight is not None,
    }
    inherited["channel_dim"] = -1 if type(layer) in CHANNELS_LAST.get(kind_of(layer) or "", ()) else 1
    if like is not None:
        inherited |= {"device": like.device, "dtype": like.dtype}
    if isinstance(layer, Norm):
        inherited["channel_dim"] = layer.channel_dim
        if isinstance(layer, BatchScopeNorm) and issubclass(cls, BatchScopeNorm):
            inherited |= {name: getattr(layer, name) for name in ("momentum", "sync", "track_running_stats")}
    elif issubclass(cls, BatchScopeNorm) and kind_of(layer) == "batch":
        inherited["momentum"] = layer.momentum
        inherited["track_running_stats"] = running_mean is not None
        inherited["sync"] = type(layer) in _SYNCHRONIZED
    return inherited


@torch.no_grad()
def _carry_over(old: nn.Module, new: Norm) -> None:
    """Copy affine and running values; a (C,) weight goes to every normalizer of a (K, C) one."""
    for name in ("weight", "bias"):
        source, target = getattr(old, name, None), getattr(new, name)
        if source is None:
            setattr(new, name, None)
        elif target is not None:
            if source.ndim > 1 and source.shape != target.shape:
                raise UserError(
                    f"a {type(old).__name__} has a {name} for each normalizer, of shape {tuple(source.shape)}, "
                    f"which does not fit {type(new).__name__}'s {tuple(target.shape)}; convert the original model"
                )
            target.copy_(source)
            target.requires_grad_(source.requires_grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        source, target = getattr(old, name, None), getattr(new, name, None)
        if source is not None and target is not None:
            target.copy_(source)
