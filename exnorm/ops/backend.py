"""Which implementation of the streaming primitives runs: one setting for the process (`ops.backend`)."""

import warnings
from types import ModuleType

import torch

from exnorm.ops import compiled, eager, native, plain

BACKENDS: dict[str, ModuleType] = {"eager": eager, "compiled": compiled, "plain": plain}

_name: str | None = None


def set_backend(name: str) -> str:
    """Choose the back end of every normalizer in this process and return the name of what was chosen.

    `auto` is `compiled` on a machine without a GPU that has a C++ compiler, else `eager`: what `compiled` gains is
    measured on CPUs only. It compiles for up to a minute where a kind of layer is new to the machine; so where nobody
    chooses, as in a notebook, the back end is `eager`.

    Raises:
        ValueError: an unknown name.
    """
    global _name
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown back end {name!r}; allowed: auto, {', '.join(BACKENDS)} (ops.backend=auto)")
    if name == "auto":
        name = "compiled" if not torch.cuda.is_available() and _can_compile() else "eager"
    if name == "compiled" and not _can_compile():
        warnings.warn("no compiler found (g++ for the CPU, Triton for a GPU): the eager back end runs", stacklevel=2)
        name = "eager"
    _name = name
    return _name


def _can_compile() -> bool:
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        return has_triton()
    return native.find_compiler() is not None


def get_backend() -> str:
    """The name of the back end in use."""
    return _name or "eager"


def implementation() -> ModuleType:
    """The module that holds the primitives of the back end in use; torch.compile traces the eager ones."""
    return eager if torch.compiler.is_compiling() else BACKENDS[get_backend()]
