"""Choose which implementation of the streaming primitives runs: one setting per process (`ops.backend`)."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.ops import eager, native

BACKENDS = ("eager", "compiled", "triton", "plain")
VARIABLE = "EXNORM_BACKEND"  # the back end of a process that calls no `set_backend`
NOTICE = (
    "exnorm: compiling the layers for this processor, once per machine, for up to a minute. Later starts load them. "
    f"{VARIABLE}=eager runs them uncompiled"
)
_TRACING = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]
_LOG = logging.getLogger(__name__)

_name: str | None = None
_module: ModuleType = eager
_is_default = False  # nobody chose the back end, and `NOTICE` was not said yet


def set_backend(name: str) -> str:
    """Choose the back end of every normalizer in this process, and return the name of the chosen one.

    `auto` chooses the fastest one: `triton` on an NVIDIA GPU, `compiled` on a machine that has no GPU but a C++
    compiler, else `eager`. If a back end cannot run on this machine, `eager` replaces it, with a warning.

    `compiled` compiles each new kind of layer once per machine, for up to a minute. In a process that never
    calls this function, the environment variable EXNORM_BACKEND chooses, else it is `auto`.

    Raises:
        ValueError: an unknown name.
    """
    global _name, _module, _is_default
    _refuse_unknown(name, "ops.backend=auto")
    if name == "auto":
        name = ("triton" if _has_triton() else "eager") if torch.cuda.is_available() else "compiled"
        name = name if _can_run(name) else "eager"
    if not _can_run(name):
        warnings.warn(f"the {name} back end needs {_NEEDS[name]}; the eager back end runs instead", stacklevel=2)
        name = "eager"
    _name, _module, _is_default = name, importlib.import_module(f"exnorm.ops.{name}"), False
    return name


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Run a block on a back end. Afterwards the choice is what it was, also if nobody has chosen yet.

    Raises:
        ValueError: an unknown name.
    """
    global _name, _module, _is_default
    before = _name, _module, _is_default
    try:
        set_backend(name)
        yield
    finally:
        _name, _module, _is_default = before


def _refuse_unknown(name: str, example: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise UserError(f"unknown back end {name!r}; allowed: auto, {', '.join(BACKENDS)} ({example})")


_NEEDS = {
    "compiled": "a compiler (g++ or clang++ for the CPU, Triton for a GPU)",
    "triton": "an NVIDIA GPU and Triton",
}


def _can_run(name: str) -> bool:
    if name == "compiled":
        return _has_triton() if torch.cuda.is_available() else native.find_compiler() is not None
    if name == "triton":
        return _has_triton() or os.environ.get("TRITON_INTERPRET") == "1"
    return True


def _has_triton() -> bool:
    """Whether this machine has a GPU that can run Triton's kernels."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    from torch.utils._triton import has_triton

    return has_triton()


def get_backend() -> str:
    """Return the name of the current back end. If none was set, choose the one of EXNORM_BACKEND, else `auto`.

    Raises:
        ValueError: EXNORM_BACKEND has an unknown name.
    """
    global _is_default
    if _name is None:
        wanted = os.environ.get(VARIABLE) or "auto"
        _refuse_unknown(wanted, f"{VARIABLE}=auto")
        set_backend(wanted)
        _is_default = wanted == "auto"
    assert _name is not None
    return _name


def say_compiling(what: str) -> None:
    """Log that something is compiled. Tell a user who chose no back end once how to turn it off, by a visible line."""
    global _is_default
    if _is_default:
        _LOG.warning(NOTICE)
        _is_default = False
    _LOG.info("compiling %s", what)


def running() -> ModuleType:
    """Return the module with the primitives of the current back end."""
    get_backend()
    return _module


def implementation(x: Tensor) -> ModuleType:
    """Return the module whose primitives a layer calls for an input: under `torch.compile` the operators.

    The eager and the plain back end are formulas that `torch.compile` can trace. For them it is always `running()`. The
    other back ends read the memory of a tensor. So the eager formulas replace them if there may be none, and also in an
    exported program, which runs without exnorm.
    """
    if get_backend() in ("eager", "plain"):
        return running()
    if is_exporting():
        return eager
    if torch.compiler.is_compiling():
        from exnorm.ops import library  # registers the operators

        return library
    return running() if has_memory(x) else eager


def is_exporting() -> bool:
    """Return whether `torch.export` traces; can be called under `torch.compile`.

    Inside `torch.compile`, torch 2.11's own `torch.compiler.is_exporting` always returns True.
    """
    exporting: bool = torch.compiler._is_exporting_flag
    return exporting


def has_memory(x: Tensor) -> bool:
    """Return whether a tensor and its results have values in memory.

    Those of a subclass such as FakeTensor or DTensor may not, and none do where torch traces the operations.
    """
    if type(x) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._len_torch_dispatch_stack() or not any(map(torch._C._get_dispatch_mode, _TRACING))
