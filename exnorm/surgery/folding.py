"""Fold layers whose coefficients are constant in evaluation mode into the convolution before them.

    act(a * (conv(x) - m) + b + residual) = act(folded(x) + residual),   folded: a * weight, a * (bias - m) + b

`a`, `b` and `m` have one value for each channel, so the equation holds for any stride, padding and number of groups.
It needs that the layer alone reads the output of the convolution, and that nobody else uses the convolution or its
weights. A symbolic trace of the model (`torch.fx`) shows both. Where it does not, the layer stays as it is.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm.layers
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exnorm.config.errors import UserError, first_line
from exnorm.norms import Moments, Norm
from exnorm.surgery import meta
from exnorm.surgery.folded import Folded
from exnorm.surgery.refusals import check_bare

# Exact types: a subclass may compute its output in another way. `Conv2dSame` only pads in another way.
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    timm.layers.Conv2dSame,
)


class _Stays(Exception):
    """Why a layer cannot be folded."""


class _Place(NamedTuple):
    """Where a layer is folded into."""

    path: str
    layer: Any  # a convolution or a linear layer
    dimensions: int | None  # see `Folded`


class _Trace(NamedTuple):
    """What a trace shows. Modules are those of the model, not of the traced copy."""

    modules: Mapping[str, nn.Module]
    calls: Mapping[nn.Module, list[fx.Node]]
    read: set[str]  # parameters that the model reads itself, outside of the layers that have them
    owners: Counter[nn.Parameter]  # in how many places each parameter is


def fold(model: nn.Module) -> nn.Module:
    """Fold layers of exnorm into the convolution before them, in place, and return the model. It is for inference.

    A layer can be folded if its scale and shift do not depend on the input: BN and batch renormalization with running
    statistics, SN and SSN whose ratios are all on BN, EN of BN alone. The convolution gets the scale in its weight and
    the shift in its bias, computed in float64. Activation, drop and residual stay, in a `Folded` module. All other
    layers stay as they are. `print(exnorm.audit(model))` says which layers were folded, and why others were not.

    A folded layer has no statistics and no parameters of its own. So `model.train()` does not change what it computes,
    and there is no way back. Fold a copy (`copy.deepcopy(model)`) to keep the model.

    Raises:
        ValueError: the model is in training mode, is wrapped or cannot be traced, or no layer can be folded. The model
            is unchanged.
    """
    check_bare(model, "fold")
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    if not norms:
        raise UserError("nothing to fold: the model has no layer of exnorm; call exnorm.convert(model, norm) first")
    if model.training:
        raise UserError("the model is in training mode, and a folded model is for inference; call model.eval() first")
    reasons = {norm: why for norm in norms if (why := _why_not_constant(norm)) is not None}
    trace = _trace(model) if len(reasons) < len(norms) else None
    places: dict[Norm, _Place] = {}
    for norm in norms:
        if trace is not None and norm not in reasons:
            try:
                places[norm] = _place_of(norm, trace)
            except _Stays as why:
                reasons[norm] = str(why)
    if not places:
        counted = Counter(reasons.values()).most_common()
        texts = [f"{why} ({count} layer{'' if count == 1 else 's'})" for why, count in counted]
        raise UserError(f"nothing to fold: {'; '.join(texts)}")
    for norm, why in reasons.items():
        norm.not_folded = why
    _replace(model, places)
    return model


def _why_not_constant(norm: Norm) -> str | None:
    """Return why the scale and shift of a layer are not constant, or cannot be known; None if they are."""
    cls = type(norm)
    if any(getattr(cls, name) is not getattr(Norm, name) for name in ("forward", "formula")):
        return f"{cls.__name__} has a forward of its own"
    if norm.training:
        return "it is in training mode"
    return "its scale and shift depend on the input" if norm.fixed_mean() is None else None


class _Reads(TorchDispatchMode):
    """Notes the tensors that operations read. In a trace, the layers themselves compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}  # by id; the tensor is kept, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def _trace(model: nn.Module) -> _Trace:
    tracer = fx.Tracer(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
    usual = tracer.is_leaf_module
    whole = (Norm, Folded, _ConvNd, nn.Linear, *timm.layers.get_notrace_modules())
    tracer.is_leaf_module = lambda module, path: isinstance(module, whole) or usual(module, path)  # type: ignore[method-assign]
    try:
        clone = meta.meta_copy(model)  # a forward may store what it computes
        with _Reads() as reads:
            graph = meta.run(tracer.trace, clone)
    except Exception as problem:
        raise UserError(
            f"torch.fx cannot trace this model ({first_line(problem)}), so it is not known which convolution comes "
            "before which layer, and nothing can be folded; use the model as it is"
        ) from problem
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(modules[str(node.target)], []).append(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    read |= {name for name, value in clone.named_parameters(remove_duplicate=False) if id(value) in reads.seen}
    owners = Counter(value for module in model.modules() for value in module._parameters.values() if value is not None)
    return _Trace(modules, calls, read, owners)


def _place_of(norm: Norm, trace: _Trace) -> _Place:
    """Return where a layer is folded into.

    Raises:
        _Stays: it cannot be folded.
    """
    if meta.is_hooked(norm):
        raise _Stays("it has hooks")
    calls = trace.calls.get(norm, [])
    if len(calls) != 1:
        raise _Stays(f"the trace of the model calls it {len(calls)} times, not once")
    residuals = [*calls[0].args[1:], *calls[0].kwargs.values()]
    if residuals and (norm.act is not None or norm.drop is not None):
        raise _Stays("it adds a residual and has an activation module")
    before = calls[0].args[0] if calls[0].args else None
    if not isinstance(before, fx.Node) or before.op != "call_module":
        raise _Stays("there is no convolution or linear layer directly before it")
    path = str(before.target)
    layer = trace.modules[path]
    if not isinstance(layer, _ConvNd | nn.Linear):
        raise _Stays("there is no convolution or linear layer directly before it")
    if len(before.users) > 1 or before in residuals:
        raise _Stays(f"the output of {path} is also used elsewhere")
    _check_layer(path, layer, trace)
    return _Place(path, layer, _dimensions(norm, path, layer))


def _check_layer(path: str, layer: _ConvNd | nn.Linear, trace: _Trace) -> None:
    """Raise _Stays if the weight of a layer cannot be changed without another effect."""
    if len(trace.calls[layer]) > 1:
        raise _Stays(f"{path} is called {len(trace.calls[layer])} times")
    if meta.is_hooked(layer) or layer._parameters.get("weight") is None:
        raise _Stays(f"{path} has hooks, or a weight that is computed (parametrization, pruning, weight norm)")
    if type(layer) not in (*_CONVOLUTIONS, nn.Linear) or "forward" in vars(layer):
        raise _Stays(f"{path} is a {type(layer).__name__}, whose formula is not known")
    for name, value in layer._parameters.items():
        if value is not None and (trace.owners[value] > 1 or f"{path}.{name}" in trace.read):
            raise _Stays(f"the {name} of {path} is also used elsewhere")


def _dimensions(norm: Norm, path: str, layer: Any) -> int | None:
    """Return the number of dimensions for which the layer's channels are those of the convolution; None for any."""
    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if linear else layer.out_channels
    if channels != norm.num_features or (norm.channel_dim != 1 and not linear):
        raise _Stays(f"it normalizes another dimension than the channels of {path}")
    if linear:
        return 2 if norm.channel_dim == 1 else None
    return layer.weight.ndim


@torch.no_grad()
def _replace(model: nn.Module, places: Mapping[Norm, _Place]) -> None:
    folded: dict[nn.Module, Folded] = {}
    for norm, (path, layer, dimensions) in places.items():
        _change(layer, *_constants(norm))
        folded[norm] = Folded(norm, into=path, dimensions=dimensions).eval()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in folded:
                parent._modules[name] = folded[child]


def _constants(norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return m, a and b of a * (x - m) + b, (C,) each, in float64."""
    mean_C = norm.fixed_mean()
    assert mean_C is not None
    mean_NC = mean_C.double()[None]
    scale_NC, shift_NC = norm.coefficients(Moments(mean_NC, torch.zeros_like(mean_NC), length=2))
    return mean_NC[0], scale_NC[0], shift_NC[0]


def _change(layer: Any, mean_C: Tensor, scale_C: Tensor, shift_C: Tensor) -> None:
    """Give a convolution or linear layer the scale and the shift."""
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):  # (inputs, C / groups, ...), where each group has its own inputs
        scale = scale_C.unflatten(0, (layer.groups, -1)).repeat_interleave(layer.in_channels // layer.groups, 0)
    else:
        scale = scale_C[:, None]
    bias_C = torch.zeros_like(mean_C) if layer.bias is None else layer.bias.double()
    if layer.bias is None:
        layer.bias = nn.Parameter(weight.new_zeros(len(mean_C)), requires_grad=weight.requires_grad)
    layer.bias.copy_(scale_C * (bias_C - mean_C) + shift_C)
    weight.copy_(weight.double() * scale.reshape(*scale.shape, *(1,) * (weight.ndim - 2)))
