"""Choose which implementation of the streaming primitives runs: one setting per process (`ops.backend`)."""

import importlib
import os
import warnings
from types import ModuleType

import torch

from exnorm.config.errors import UserError
from exnorm.ops import eager, native

BACKENDS = ("eager", "compiled", "triton", "plain")

_name: str | None = None
_module: ModuleType = eager


def set_backend(name: str) -> str:
    """Choose the back end of every normalizer in this process, and return the name of the chosen one.

    `auto` chooses the fastest one: `triton` on an NVIDIA GPU, `compiled` on a machine that has no GPU but a C++
    compiler, else `eager`. If a back end cannot run on this machine, `eager` replaces it, with a warning.

    `compiled` compiles each new kind of layer once per machine, for up to a minute. So it is never the default: without
    a call of this function, as in a notebook, the back end is `triton` on an NVIDIA GPU, else `eager`.

    Raises:
        ValueError: an unknown name.
    """
    global _name, _module
    if name not in ("auto", *BACKENDS):
        raise UserError(f"unknown back end {name!r}; allowed: auto, {', '.join(BACKENDS)} (ops.backend=auto)")
    if name == "auto":
        name = ("triton" if _has_triton() else "eager") if torch.cuda.is_available() else "compiled"
        name = name if _can_run(name) else "eager"
    if not _can_run(name):
        warnings.warn(f"the {name} back end needs {_NEEDS[name]}; the eager back end runs instead", stacklevel=2)
        name = "eager"
    _name, _module = name, importlib.import_module(f"exnorm.ops.{name}")
    return name


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
    """Return the name of the current back end: the one that was set, else `triton` on an NVIDIA GPU, else `eager`."""
    if _name is None:
        set_backend("triton" if _has_triton() else "eager")
    assert _name is not None
    return _name


def running() -> ModuleType:
    """Return the module with the primitives of the current back end."""
    get_backend()
    return _module


def implementation() -> ModuleType:
    """Return the module whose primitives a layer calls: under `torch.compile` the operators, else `running()`.

    The eager and the plain back end are formulas that `torch.compile` can trace. For them it is always `running()`.
    """
    if not torch.compiler.is_compiling() or get_backend() in ("eager", "plain"):
        return running()
    from exnorm.ops import library  # registers the operators

    return library
