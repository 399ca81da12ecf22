"""Real processes that work together, for tests of what spans several of them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """Return a port that no process uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(work: Callable[[int, int, str], None], count: int, folder: Path) -> list[Any]:
    """Run `work(rank, port, folder)` in each process; return what each has saved as `<rank>.pt` in the folder."""
    start: Callable[..., Any] = mp.spawn
    start(work, args=(free_port(), str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
