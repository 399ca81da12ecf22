"""Find which activation follows which normalization layer, by a forward of a copy of the model on the meta device.

A pair is proven if these conditions hold in training and in evaluation mode. The layer runs once. Its output goes into
the activation before any other operation reads it, and no operation reads it afterwards. The activation runs once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import timm.layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exnorm.ops import ACTIVATIONS
from exnorm.surgery import meta
from exnorm.surgery.meta import is_hooked


def activation_name(module: nn.Module | None) -> str | None:
    """Return the name under which the affine pass applies this activation module itself; None if it cannot."""
    if type(module) in (nn.GELU, timm.layers.GELU) and getattr(module, "approximate", "none") == "none":
        return "gelu"
    names = [name for name, activation in ACTIVATIONS.items() if type(module) is activation.module]
    return names[0] if names else None


def following_activations(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return the activation after each of these layers, if the pair is proven; empty if the model cannot be traced."""
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    candidates = {paths[layer] for layer in layers if not is_hooked(layer)}
    activations = {path for module, path in paths.items() if activation_name(module) and not is_hooked(module)}
    if not candidates or not activations:
        return {}
    try:
        clone = meta.meta_copy(model)
        example = meta.example_input(model)
        pairs = [_trace(clone.train(mode), example, candidates, activations) for mode in (True, False)]
    except Exception:  # noqa: BLE001  # a model that the meta device cannot run proves nothing
        return {}
    return {modules[k]: modules[v] for k, v in pairs[0].items() if pairs[1].get(k) == v}


def _trace(model: nn.Module, example: Tensor, candidates: set[str], activations: set[str]) -> dict[str, str]:
    trace = _Trace()
    handles = []
    for path, module in model.named_modules():
        if path in candidates:
            handles.append(module.register_forward_hook(lambda m, a, y, path=path: trace.leave_norm(path, y)))
        if path in activations:
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: trace.enter(path, a)))
            handles.append(module.register_forward_hook(lambda m, a, y, path=path: trace.leave(y)))
    try:
        with trace:
            output = meta.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return dict(trace.pairs(output))


class _Trace(TorchDispatchMode):
    """Track the outputs of normalization layers by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_calls: Counter[str] = Counter()
        self.activation_calls: Counter[str] = Counter()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # by id; the tensor is kept, so that no id is used twice
        self.taken: dict[str, str] = {}
        self.touched: set[str] = set()
        self.inside: str | None = None  # the layer whose output an activation is reading

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            path = self._layer_of(value)
            if path is not None and path != self.inside:
                self.touched.add(path)
        return func(*args, **(kwargs or {}))

    def _layer_of(self, value: Any) -> str | None:
        return self.outputs[id(value)][0] if isinstance(value, Tensor) and id(value) in self.outputs else None

    def leave_norm(self, path: str, output: Tensor) -> None:
        self.norm_calls[path] += 1
        self.outputs[id(output)] = (path, output)

    def enter(self, activation: str, args: Any) -> None:
        self.activation_calls[activation] += 1
        path = self._layer_of(args[0]) if args else None
        if path is not None:
            if path in self.taken:
                self.touched.add(path)
            self.taken[path] = activation
        self.inside = path

    def leave(self, output: Tensor) -> None:
        if self.inside is not None:
            self.outputs.pop(id(output), None)  # applied in place: from here on it is the activation's output
        self.inside = None

    def pairs(self, output: Any) -> Iterator[tuple[str, str]]:
        returned = {self._layer_of(value) for value in tree_leaves(output)}
        for path, activation in self.taken.items():
            once = self.norm_calls[path] == 1 and self.activation_calls[activation] == 1
            if once and path not in self.touched and path not in returned:
                yield path, activation
