"""Residual additions behind a normalization layer: `act(norm(x) + shortcut)` as one pass of the layer.

A block of a backbone adds in its `forward`, out of reach for a swap of modules. So the block's forward is traced
(torch.fx), and where the trace holds a layer of ours whose output goes into an addition and nowhere else, the block
gets a class of its own, derived from its class, with the rewritten forward. All else stays: the block is the same
object with the same children, attributes and state, and still an instance of its class; it can be copied and pickled.

A trace is believed if the block's class is timm's or torchvision's and does nothing that a trace cannot hold (switch
modes of torch, keep values, draw numbers, checkpoint), if it traces alike in training and in evaluation mode, and does,
on the input that it has in the model, the same operations as the block itself; seen on a copy of the model on the meta
device. Blocks of other packages are left alone: their forward may do more than can be seen in its operations.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from exnorm.config.errors import UserError
from exnorm.norms import Norm
from exnorm.surgery import meta

_ADDITIONS = (operator.add, torch.add, "add", "add_")
# What a block's class may define beside `forward`: nothing that changes later on what `forward` does.
_HARMLESS = ("init_weights", "reset_parameters", "zero_init_last", "extra_repr", "feature_info")
TRUSTED = ("timm.", "torchvision.")
_NOT_IN_A_TRACE = re.compile(r"(?m)^ *with .*:$|\bself\.\w+ *=[^=]|checkpoint|\.apply\(|random|grad_enabled|autocast")


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
        inputs = _inputs(clone, {*blocks, *free, *(path for path, m in modules.items() if type(m) is nn.ReLU)})
    except Exception:  # noqa: BLE001  # what the meta device cannot run proves nothing
        return
    once = inputs.keys()
    for path in blocks:
        # What is called once in the model is called by this block, and by nobody else.
        own = {name.removeprefix(f"{path}.") for name in once if name.startswith(f"{path}.")}
        layers = {name for name in own if f"{path}.{name}" in free}
        if path in once and layers:
            rewrite = _rewrite(clone.get_submodule(path), layers, own, inputs[path])
            if rewrite is not None:
                _apply(rewrite, modules[path], path)
                # Another block that looked into this one would still see its old forward.
                free -= {name for name in free if name.startswith(f"{path}.")}


def _can_add(module: nn.Module) -> bool:
    if not isinstance(module, Norm) or type(module).forward is not Norm.forward or meta.is_hooked(module):
        return False
    return module.fused_act is None and module.act is None and module.drop is None


def _blocks(modules: dict[str, nn.Module], layers: set[str]) -> Iterator[str]:
    """The parents of these layers and the parents of those, the innermost first; never the model itself."""
    parents = {path.rpartition(".")[0] for path in layers}
    parents |= {path.rpartition(".")[0] for path in parents}
    for path in sorted(parents, key=lambda path: (-path.count("."), path)):
        if path and not isinstance(modules[path], nn.Sequential) and _is_plain(modules[path]):
            yield path


@functools.cache
def _is_plain_class(cls: type[nn.Module]) -> bool:
    """Whether what a class does is in its forward, and in a trace of it."""
    if cls is nn.Sequential:
        return True
    classes = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    if not all(base.__module__.startswith((*TRUSTED, "torch.nn.")) for base in classes):
        return False
    methods = [(name, value) for base in classes for name, value in vars(base).items() if inspect.isfunction(value)]
    if not all(name.startswith("_") or name in ("forward", *_HARMLESS) for name, _ in methods):
        return False
    run = [value for name, value in methods if not name.startswith("__") and name not in _HARMLESS]
    return not any(_NOT_IN_A_TRACE.search(inspect.getsource(method)) for method in run)


def _is_plain(module: nn.Module) -> bool:
    """The same of a block itself: its forward is its class's, and nobody has rewritten it yet."""
    return "forward" not in vars(module) and not isinstance(module, _Rewritten) and _is_plain_class(type(module))


def _without_arithmetic(clone: nn.Module) -> nn.Module:
    """A model on the meta device whose normalizers only pass on a tensor: what they compute proves nothing here."""

    def stand_in(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.shape != x.shape:
            raise UserError(f"the residual's shape {tuple(residual.shape)} is not the input's, {tuple(x.shape)}")
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


def _rewrite(block: nn.Module, layers: set[str], once: set[str], args: tuple[Any, ...]) -> _Rewrite | None:
    """The block's forward with the additions that these layers can do; None if there are none or nothing is proven.

    Args:
        once: the layers and ReLUs that run once in the model.
    """
    try:
        found = _fuse(_trace(block, _parents(layers)), block, layers, once)
        # What was looked into loses the hooks that it gets later on: it is done only where it helps.
        opened = _parents(set(found.layers))
        if not found.layers or not _is_faithful(block, opened, set(found.layers), args):
            return None
        rewrite = _fuse(_trace(block, opened), block, layers, once)
        meta.run(rewritten(type(block), rewrite.source).forward, block, *_fresh(args))  # so do shapes that differ
    except Exception:  # noqa: BLE001  # what cannot be traced or run is left as it is
        return None
    return rewrite


def _parents(paths: set[str]) -> set[str]:
    return {path.rpartition(".")[0] for path in paths} - {""}


def _trace(block: nn.Module, opened: set[str]) -> fx.Graph:
    """The block's forward as calls of its children; those named are looked into."""
    tracer = fx.Tracer()
    inside = {block.get_submodule(path) for path in opened}
    inside = {module for module in inside if _is_plain(module) and not meta.is_hooked(module)}
    tracer.is_leaf_module = lambda module, path: module not in inside  # type: ignore[method-assign]
    graph = meta.run(tracer.trace, block)
    if any(node.op == "get_attr" for node in graph.nodes):
        raise ValueError("a tensor of the block's own, which the trace would keep as it is")
    return graph


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


def _fuse(graph: fx.Graph, block: nn.Module, layers: set[str], once: set[str]) -> _Rewrite:
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
    idle = {relu for relu in done.values() if relu in once and relu not in called}
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
            # The layer moves to its addition, so its input must be a new tensor that nobody changes until then.
            return chain if isinstance(before, fx.Node) and _is_new(before, block) and len(before.users) == 1 else None
        between = block.get_submodule(str(node.target))
        if type(between) is not nn.Identity or meta.is_hooked(between) or not isinstance(before, fx.Node):
            return None
        node = before
    return None


def _is_new(node: fx.Node, block: nn.Module) -> bool:
    """Whether a value is a layer's own result and no view of another tensor."""
    return node.op == "call_module" and isinstance(block.get_submodule(str(node.target)), _ConvNd | nn.Linear)


def _relu_behind(addition: fx.Node, block: nn.Module) -> fx.Node | None:
    """The ReLU that alone reads a sum."""
    users = list(addition.users)
    if len(users) == 1 and users[0].op == "call_module" and users[0].args == (addition,):
        relu = block.get_submodule(str(users[0].target))
        return users[0] if type(relu) is nn.ReLU and not meta.is_hooked(relu) else None
    return None


def _apply(rewrite: _Rewrite, block: nn.Module, path: str) -> None:
    block.__class__ = rewritten(type(block), rewrite.source)
    for name, relu in rewrite.layers.items():
        layer = block.get_submodule(name)
        assert isinstance(layer, Norm)
        layer.adds_residual_of = path
        if relu is not None:
            layer.fused_act, layer.took_over = "relu", f"{path}.{relu}"
    for relu in rewrite.idle:
        block.set_submodule(relu, nn.Identity())


class _Rewritten:
    """Marks a block with a rewritten forward; copies and pickles carry its source."""

    original: type[nn.Module]
    source: str

    def __init_subclass__(cls, **options: Any) -> None:
        """Not a class of its own to those who count the subclasses of a block's."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.original, self.source), self.__getstate__()


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
