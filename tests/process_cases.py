"""Real processes that work together, for tests of what spans several of them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def in_processes(work: Callable[[int, int, str], None], count: int, folder: Path) -> list[Any]:
    """Run `work(rank, port, folder)` in each process; return what each has saved as `<rank>.pt` in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start: Callable[..., Any] = mp.spawn
    start(work, args=(port, str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
