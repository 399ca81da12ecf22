"""Which implementation of the streaming primitives runs: one setting for the process (`ops.backend`)."""

from types import ModuleType

from exnorm.ops import eager

BACKENDS: dict[str, ModuleType] = {"eager": eager}

_backend = eager
_name = "eager"


def set_backend(name: str) -> str:
    """Choose the back end of every normalizer in this process and return the name of what was chosen.

    `auto` takes the fastest that runs here.

    Raises:
        ValueError: an unknown name.
    """
    global _backend, _name
    chosen = "eager" if name == "auto" else name
    if chosen not in BACKENDS:
        raise ValueError(f"unknown back end {name!r}; allowed: auto, {', '.join(BACKENDS)} (ops.backend=auto)")
    _backend, _name = BACKENDS[chosen], chosen
    return chosen


def get_backend() -> str:
    """The name of the back end in use."""
    return _name


def implementation() -> ModuleType:
    """The module that holds the primitives of the back end in use."""
    return _backend
