"""Real processes that work together, for tests of what spans several of them.

They fork from a process that has imported torch and the engine and has done nothing else: importing takes longer than
most of these tests.
"""

import multiprocessing
import os
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
    run_forked(work, count, free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def run_forked(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in each of some processes to its end, with this folder and these variables.

    Raises:
        torch.multiprocessing.ProcessException: one of them failed. The message has its traceback.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["exnorm.engine.train"])
    here = (os.getcwd(), dict(os.environ))
    start: Callable[..., Any] = mp.start_processes
    start(_in_place, args=(work, here, arguments), nprocs=count, start_method="forkserver")


def _in_place(
    rank: int, work: Callable[..., None], here: tuple[str, dict[str, str]], arguments: tuple[Any, ...]
) -> None:
    """Go to the folder of the test, take its variables and one thread, and do the work."""
    os.chdir(here[0])
    os.environ.clear()
    os.environ.update(here[1])
    torch.set_num_threads(1)
    work(rank, *arguments)
