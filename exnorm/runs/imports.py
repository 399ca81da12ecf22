"""Import torch and what is built on it in less time. Imports no torch itself."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without Python's collection of cyclic garbage.

    An import makes many objects that stay and hardly any garbage. The collector looks through all of them again and
    again, which is a good part of the time that torch, torchvision and timm take to import.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
