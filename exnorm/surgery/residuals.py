"""Residual additions behind a normalization layer: `act(norm(x) + shortcut)` as one pass of the layer.

A block of a backbone adds in its `forward`, out of reach for a swap of modules. So the block's forward is traced
(torch.fx), and where the trace holds a layer of ours whose output goes into an addition and nowhere else, the block
gets a class of its own, derived from its class, with the rewritten forward. All else stays: the block is the same
object with the same children, attributes and state, and still an instance of its class; it can be copied and pickled.

A trace is believed if the block traces alike in training and in evaluation mode and does, on the input that it has in
the model, the same operations as the block itself; seen on a copy of the model on the meta device.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from exnorm.norms import Norm
from exnorm.surgery import meta

_ADDITIONS = (operator.add, torch.add, "add", "add_")
# What a block's class may define beside `forward`: nothing that changes later on what `forward` does.
_HARMLESS = ("init_weights", "reset_parameters", "zero_init_last", "extra_repr", "feature_info")


class _Rewrite(NamedTuple):
    """A block's new forward. All paths are relative to the block."""

    source: str
    layers: dict[str, str | None]  # each layer that adds a residual, and the ReLU that it applies behind it
    idle: set[str]  # the ReLUs that are called no more


def fuse_residuals(model: nn.Module) -> None:
    """Let each layer of ours add the residual behind it, and apply the ReLU behind that, where a trace proves it."""
    modules = dict(model.named_modules())
    free = {path for path, module in modules.items() if _can_add(module)}
    blocks = list(_blocks(modules, free))
    if not blocks:
        return
    try:
        clone = _without_arithmetic(meta.meta_copy(model))
        inputs = _inputs(clone, {*blocks, *free})
    except Exception:  # noqa: BLE001  # what the meta device cannot run proves nothing
        return
    for path in blocks:
        layers = {name.removeprefix(f"{path}.") for name in free & inputs.keys() if name.startswith(f"{path}.")}
        if path in inputs and layers:
            rewrite = _rewrite(clone.get_submodule(path), layers, inputs[path])
            if rewrite is not None:
                _apply(rewrite, modules[path], path)
                free -= {f"{path}.{name}" for name in rewrite.layers}


def _can_add(module: nn.Module) -> bool:
    no_act = isinstance(module, Norm) and module.fused_act is None and module.act is None and module.drop is None
    return no_act and not meta.is_hooked(module)


def _blocks(modules: dict[str, nn.Module], layers: set[str]) -> Iterator[str]:
    """The parents of these layers and the parents of those, the innermost first; never the model itself."""
    parents = {path.rpartition(".")[0] for path in layers}
    parents |= {path.rpartition(".")[0] for path in parents}
    for path in sorted(parents, key=lambda path: (-path.count("."), path)):
        module = modules[path]
        if path and not isinstance(module, nn.Sequential | _Rewritten):
            classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
            public = {name for cls in classes for name, value in vars(cls).items() if callable(value)}
            if "forward" in public and all(name.startswith("_") or name in ("forward", *_HARMLESS) for name in public):
                yield path


def _without_arithmetic(clone: nn.Module) -> nn.Module:
    """A model on the meta device whose normalizers only pass on a tensor: what they compute proves nothing here."""

    def stand_in(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"the residual's shape {tuple(residual.shape)} is not the input's, {tuple(x.shape)}")
        return x.clone()

    for module in clone.modules():
        if isinstance(module, Norm):
            module.forward = stand_in  # type: ignore[method-assign]
    return clone


def _inputs(clone: nn.Module, paths: set[str]) -> dict[str, tuple[Any, ...]]:
    """The arguments of each of these modules in a forward of the model, if it ran once and was given them in order."""
    calls: dict[str, list[tuple[Any, ...]]] = {path: [] for path in paths}

    def watch(path: str) -> RemovableHandle:
        def note(_: nn.Module, args: tuple[Any, ...], names: dict[str, Any]) -> None:
            calls[path] += [args, args] if names else [args]

        return clone.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(path) for path in paths]
    meta.run(clone, meta.example_input(clone))
    for handle in handles:
        handle.remove()
    return {path: args[0] for path, args in calls.items() if len(args) == 1}


def _rewrite(block: nn.Module, layers: set[str], args: tuple[Any, ...]) -> _Rewrite | None:
    """The block's forward with the additions that these layers can do; None if there are none or nothing is proven."""
    try:
        found = _fuse(_trace(block, _parents(layers)), block, layers)
        # What was looked into loses the hooks that it gets later on: it is done only where it helps.
        opened = _parents(set(found.layers))
        if not found.layers or not _is_faithful(block, opened, set(found.layers), args):
            return None
        rewrite = _fuse(_trace(block, opened), block, layers)
        meta.run(_function(rewrite.source), block, *_fresh(args))  # shapes that do not agree show here
    except Exception:  # noqa: BLE001  # what cannot be traced or run is left as it is
        return None
    return rewrite


def _parents(paths: set[str]) -> set[str]:
    return {path.rpartition(".")[0] for path in paths} - {""}


def _trace(block: nn.Module, opened: set[str]) -> fx.Graph:
    """The block's forward as calls of its children; those named are looked into."""
    tracer = fx.Tracer()
    inside = {block.get_submodule(path) for path in opened}
    tracer.is_leaf_module = lambda module, path: module not in inside or meta.is_hooked(module)  # type: ignore[method-assign]
    return tracer.trace(block)


def _is_faithful(block: nn.Module, opened: set[str], layers: set[str], args: tuple[Any, ...]) -> bool:
    texts = []
    for mode in (True, False):
        graph = _trace(block.train(mode), opened)
        text = graph.python_code("self").src
        runs = [_operations(forward, block, layers, args) for forward in (type(block).forward, _function(text))]
        # An argument that was left out is one more in the trace.
        if runs[0] != runs[1] or sum(node.op == "placeholder" for node in graph.nodes) != len(args):
            return False
        texts.append(text)
    return texts[0] == texts[1]


def _operations(forward: Callable[..., Any], block: nn.Module, layers: set[str], args: tuple[Any, ...]) -> list[Any]:
    operations = _Operations()

    def note(layer: nn.Module, args: Any, y: Tensor) -> None:
        operations.outputs.append(y)

    handles = [block.get_submodule(layer).register_forward_hook(note) for layer in layers]
    with operations:
        meta.run(forward, block, *_fresh(args))
    for handle in handles:
        handle.remove()
    return operations.seen


def _fresh(args: tuple[Any, ...]) -> Any:
    return tree_map(lambda value: torch.empty_like(value) if isinstance(value, Tensor) else value, args)


class _Operations(TorchDispatchMode):
    """Writes down each operation with the shapes of its tensors and its other arguments.

    `x += y` is traced as `x + y`, which is the same where x is the output of a layer and nobody else's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func
        if func is torch.ops.aten.add_.Tensor and any(args[0] is output for output in self.outputs):
            name = torch.ops.aten.add.Tensor
        self.seen.append((name, str(tree_map(_shape, (args, kwargs)))))
        return func(*args, **(kwargs or {}))


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _fuse(graph: fx.Graph, block: nn.Module, layers: set[str]) -> _Rewrite:
    """Let layers do the additions behind them, in the graph."""
    done: dict[str, str | None] = {}
    for addition in list(graph.nodes):
        for norm, residual in _operands(addition):
            chain = _chain(norm, block, layers)
            if chain is None or norm is residual:
                continue
            layer = chain[-1]
            relu = _relu_behind(addition, block)
            with graph.inserting_before(addition):
                fused = graph.call_module(str(layer.target), (layer.args[0], residual))
            (relu or addition).replace_all_uses_with(fused)
            done[str(layer.target)] = str(relu.target) if relu else None
            for node in filter(None, (relu, addition, *chain)):
                graph.erase_node(node)
            break
    graph.lint()
    called = {node.target for node in graph.nodes}
    idle = {relu for relu in done.values() if relu is not None and relu not in called}
    return _Rewrite(graph.python_code("self").src, done, idle)


def _operands(node: fx.Node) -> list[tuple[Any, Any]]:
    """The ways to see an addition as one of a layer's output and a residual; only the first may be overwritten."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return []
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return []
    a, b = node.args
    return [(a, b)] if node.target == "add_" else [(a, b), (b, a)]


def _chain(node: fx.Node, block: nn.Module, layers: set[str]) -> list[fx.Node] | None:
    """The calls from an operand back to the layer that made it, through identities; None if others read them too."""
    chain = []
    while node.op == "call_module" and len(node.users) == 1 and len(node.args) == 1 and not node.kwargs:
        chain.append(node)
        before = node.args[0]
        if node.target in layers:
            # The layer moves to its addition, so its input must be a result that nobody changes until then.
            alone = isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
            return chain if alone else None
        if type(block.get_submodule(str(node.target))) is not nn.Identity or not isinstance(before, fx.Node):
            return None
        node = before
    return None


def _relu_behind(addition: fx.Node, block: nn.Module) -> fx.Node | None:
    """The ReLU that alone reads a sum."""
    users = list(addition.users)
    if len(users) == 1 and users[0].op == "call_module" and users[0].args == (addition,):
        relu = block.get_submodule(str(users[0].target))
        return users[0] if type(relu) is nn.ReLU and not meta.is_hooked(relu) else None
    return None


def _apply(rewrite: _Rewrite, block: nn.Module, path: str) -> None:
    for name, relu in rewrite.layers.items():
        layer = block.get_submodule(name)
        assert isinstance(layer, Norm)
        layer.adds_residual_of = path
        if relu is not None:
            layer.fused_act, layer.took_over = "relu", f"{path}.{relu}"
    for relu in rewrite.idle:
        block.set_submodule(relu, nn.Identity())
    block.__class__ = rewritten(type(block), rewrite.source)


class _Rewritten:
    """Marks a block with a rewritten forward; copies and pickles carry its source."""

    original: type[nn.Module]
    source: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.original, self.source), self.__dict__


@functools.cache
def rewritten(cls: type[nn.Module], source: str) -> Any:
    """A subclass of a block's class with the forward of this source."""
    own = {"__module__": cls.__module__, "forward": _function(source), "original": cls, "source": source}
    return type(cls.__name__, (_Rewritten, cls), own)


def _function(source: str) -> Callable[..., Any]:
    """The `forward` of a graph's text, in which torch is the only name from outside."""
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)  # written by torch.fx
    return names["forward"]  # type: ignore[no-any-return]


def _rebuild(cls: type[nn.Module], source: str) -> Any:
    kind = rewritten(cls, source)
    return kind.__new__(kind)
