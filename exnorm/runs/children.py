"""What a process needs to know that works for another one. Imports no torch."""

import os
import sys
import threading

END_WITH_PARENT = "EXNORM_END_WITH_PARENT"  # set for a command that is to end when its standard input closes


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def importing_environment() -> dict[str, str]:
    """The environment for a Python that is to import what this one can, through `sys.path` alone if need be."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def end_with_parent() -> None:
    """End this process, at once, when its standard input closes: when whoever started it dies, however that happens."""
    threading.Thread(target=_wait_for_end_of_input, daemon=True).start()


def _wait_for_end_of_input() -> None:
    # The descriptor, not sys.stdin: loader processes are forked, and a buffer's lock held here would be held there.
    while os.read(0, 1):
        pass
    os._exit(1)
