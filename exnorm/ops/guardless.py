"""Compile functions of tensors with torch's inductor, once for each kind of arguments and without guards.

At every call, torch.compile checks all its assumptions (its guards). For a layer of small tensors, this takes longer
than the layer. Here the assumptions are few and known, so they are the key under which a compiled function is kept:
the dtypes, the devices, the strides that are not contiguous, which sizes are 1, and whether an index into the tensor
fits 32 bits (code for a GPU depends on it). Other sizes are dynamic: a function must not branch on a size in any other
way.
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
    """A function of tensors and None that is compiled at its first call with each new kind of arguments.

    If the compilation fails, the function runs uncompiled, after one warning with its name.
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
            except BackendCompilerFailed:  # torch.compiler.reset() has discarded the compiled code
                del self.compiled[key]
        return self._first_call(key, args)

    def _first_call(self, key: Hashable, args: tuple[Any, ...]) -> Any:
        # torch keeps compiled code per code object. Each key has its own copy, so no guards must distinguish the keys.
        code = self.function.__code__.replace()
        copy = types.FunctionType(code, self.function.__globals__, code.co_name, None, self.function.__closure__)
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        compiled = torch.compile(copy, fullgraph=True, dynamic=True, backend=self._backend, options=options)
        try:
            with without_saved_tensor_hooks(), _independent_sizes():
                result = compiled(*args)
        except Exception as problem:  # noqa: BLE001  # whatever the error, the uncompiled function still works
            warn_once(self.name, problem)
            compiled, result = self.function, self.function(*args)
        self.compiled[key] = compiled
        return result

    def _backend(self, graph: Any, inputs: Any) -> Any:
        if not _sizes_are_independent:
            raise RuntimeError("compiled outside of a first call")
        with without_warnings():
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs)


def _facts(arg: Any) -> Hashable:
    """Return the part of the key for one argument: all that the compiled code may assume of it."""
    if isinstance(arg, Tensor):
        shape = arg.shape
        sizes = tuple([size == 1 for size in shape]) if 1 in shape else len(shape)
        return arg.dtype, arg.device, sizes, arg.is_contiguous() or arg.stride(), arg.numel() > _LARGEST_INDEX
    return arg


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hide what torch's compiler warns of when it is imported and when it compiles, such as its own deprecations.

    It does not concern the user, and where warnings are errors (pytest) it would end the compilation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Disable saved-tensor hooks (such as activation checkpointing's): `torch.func` cannot be traced under them."""
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
    """Make torch use separate symbols for sizes that are equal at the first call, and treat floats as constants."""
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
    """Warn, once per process, that something runs eagerly, and why."""
    if what not in _warned:
        _warned.add(what)
        why = f"{type(problem).__name__}: {first_line(problem)}"
        warnings.warn(f"{what} could not be compiled and runs eagerly, which is slower: {why}", stacklevel=3)
