"""A limit for the answers of W&B's service, a process that the training starts and then waits for. Linux only."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVICE = "wandb-core"
LIMIT_S = {"offline": 120.0, "online": 600.0}  # online, the last call uploads what is left
LEAVE_S = 10.0  # for the last call of a run that stops early or fails


@contextmanager
def answers_within(limit_s: float) -> Iterator[None]:
    """End W&B's service if the calls in this context take longer. The call that waits for it then raises an error."""
    timer = threading.Timer(limit_s, end_service)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_service() -> None:
    """SIGKILL to W&B's service, also to one that is stopped."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # a process that has just ended
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            if name == SERVICE and int(rest.split()[1]) == os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
