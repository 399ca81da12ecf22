"""Functions of tensors compiled by torch's inductor: once for each set of facts about the arguments, and no guards.

torch.compile guards every call with a check of all that was assumed, which for a layer of small tensors costs more
than the layer. Here the assumptions are few and known: they are the key under which a compiled function is kept. Sizes
are dynamic, but a size of 1 is a fact; so are dtypes, devices, strides that are not contiguous, and whether an index
into the tensor fits 32 bits, for which code on a GPU is made. A function given here must not branch on a size in any
other way.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from exnorm.config.errors import first_line

_LARGEST_INDEX = 2**31 - 1


class GuardlessFunction:
    """A function of tensors and None, compiled at its first call with arguments of a new kind.

    Where that fails, it runs as it is, after one warning with its name.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.compiled: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        key = tuple([_facts(arg) for arg in args])
        compiled = self.compiled.get(key)
        if compiled is not None:
            try:
                return compiled(*args)
            except BackendCompilerFailed:  # torch.compiler.reset() has thrown the compiled code away
                del self.compiled[key]
        return self._first_call(key, args)

    def _first_call(self, key: Hashable, args: tuple[Any, ...]) -> Any:
        # torch keeps compiled code per code object; a copy for each key needs no guards to tell them apart.
        code = self.function.__code__.replace()
        copy = types.FunctionType(code, self.function.__globals__, code.co_name, None, self.function.__closure__)
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        compiled = torch.compile(copy, fullgraph=True, dynamic=True, backend=self._backend, options=options)
        try:
            with without_saved_tensor_hooks(), _independent_sizes():
                result = compiled(*args)
        except Exception as problem:  # noqa: BLE001  # whatever a compiler stumbles over, the function is there
            warn_once(self.name, problem)
            compiled, result = self.function, self.function(*args)
        self.compiled[key] = compiled
        return result

    def _backend(self, graph: Any, inputs: Any) -> Any:
        if not _sizes_are_independent:
            raise RuntimeError("compiled outside of a first call")
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)


def _facts(arg: Any) -> Hashable:
    """All that the compiled code may assume of an argument besides its number of dimensions."""
    if isinstance(arg, Tensor):
        shape = arg.shape
        sizes = tuple([size == 1 for size in shape]) if 1 in shape else len(shape)
        return arg.dtype, arg.device, sizes, arg.is_contiguous() or arg.stride(), arg.numel() > _LARGEST_INDEX
    return arg


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Those of activation checkpointing, say, which `torch.func` refuses to be traced under."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009  # not in torch's stubs
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


_sizes_are_independent = False


@contextlib.contextmanager
def _independent_sizes() -> Iterator[None]:
    """Sizes that happen to be equal at the first call get symbols of their own; floats are constants."""
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as symbolic

    global _sizes_are_independent
    with dynamo.patch(specialize_float=True), symbolic.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        _sizes_are_independent = True
        try:
            yield
        finally:
            _sizes_are_independent = False


_warned: set[str] = set()


def warn_once(what: str, problem: Exception) -> None:
    """Say why something runs eagerly, once in a process."""
    if what not in _warned:
        _warned.add(what)
        why = f"{type(problem).__name__}: {first_line(problem)}"
        warnings.warn(f"{what} could not be compiled and runs eagerly, which is slower: {why}", stacklevel=3)
