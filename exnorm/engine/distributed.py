"""The rank of this process among the workers, and the communication between them."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exnorm.config.errors import UserError


@dataclass(frozen=True)
class World:
    """A worker's rank among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return whether this worker writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all workers, which can be pickled, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def largest(self, *values: int) -> list[int]:
        """Return the maximum of each value over all workers, exchanged on the CPU."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.long)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Wait until all workers have called this."""
        if self.size > 1:
            dist.barrier()


def join(device_type: str, *, store: Any = None) -> World:
    """Join the workers described by the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Args:
        store: where they meet; None for MASTER_ADDR and MASTER_PORT.
    """
    rank, size = (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    device = torch.device("cuda", gpu_of(local_rank)) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
        )
    return World(rank, size, device)


def gpu_of(local_rank: int) -> int:
    """Return the number of a worker's GPU. A cluster may show each process its own GPU only, as number 0.

    Raises:
        UserError: there are fewer GPUs than workers.
    """
    count = torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise UserError(f"this process is number {local_rank} on its node, counted from 0, but there are {count} GPUs")


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def replica_group(world: World, span: int) -> Any:
    """Return the process group of this worker's replica, `span` consecutive ranks; None if it is on one device."""
    if span == 1:
        return None
    groups = [dist.new_group(list(range(first, first + span))) for first in range(0, world.size, span)]
    return groups[world.rank // span]
