"""A job: several processes that torchrun, SLURM's srun or submitit started, on one node or several. Imports no torch.

Each process is one worker of a run, with one device. torchrun describes it by RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. srun describes it by variables of SLURM, from which the same five are made here.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exnorm.config.errors import UserError

FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TOGETHER = "EXNORM_TOGETHER"  # set by a job of --submit: `exnorm reproduce` in its first task trains with all tasks
TASKS_OF_SRUN = "SLURM_STEP_NUM_TASKS"  # set by srun alone; in a batch script SLURM_PROCID is 0, too
PORTS = range(20_000, 30_000)  # one of them is chosen by the number of a job


@dataclass(frozen=True)
class Place:
    """The place of this process in its job.

    Attributes:
        rank, size: the number of this process among all processes of the job.
        local_rank: its number on its node, which is also that of its GPU.
        node: identifies the node.
        host: the name of the machine, for messages.
        words: the settings of its command; none if it takes part in whatever the first process trains.
    """

    rank: int
    size: int
    local_rank: int
    node: str
    host: str
    words: Sequence[str] = ()


def place_in_job(words: Sequence[str]) -> Place | None:
    """Return the place of this process in a job; None if it was started alone. Sets torchrun's variables under srun.

    Args:
        words: the settings of its command.

    Raises:
        UserError: the description of the job is incomplete.
    """
    from exnorm.engine.worker import CONTROLLED

    if os.environ.get(CONTROLLED):
        return None
    if int(os.environ.get(TASKS_OF_SRUN, "1")) > 1 and "LOCAL_RANK" not in os.environ:
        os.environ.update(_described_by_slurm())
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    missing = [name for name in FROM_TORCHRUN if not os.environ.get(name)]
    if missing:
        raise UserError(f"this process is one of {os.environ['WORLD_SIZE']}, but {missing[0]} is not set")
    host = socket.gethostname()
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or host
    rank, size, local_rank = (int(os.environ[name]) for name in FROM_TORCHRUN[:3])
    return Place(rank, size, local_rank, node, host, list(words))


def outside_of_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the description of a job, for commands that several tasks of srun start each alone.

    A job of `--submit` keeps it: its tasks train each run together.
    """
    if TOGETHER in environment:
        return dict(environment)
    described = {*FROM_TORCHRUN, TASKS_OF_SRUN}
    return {name: value for name, value in environment.items() if name not in described}


def _described_by_slurm() -> dict[str, str]:
    """Return torchrun's variables for a task of srun. MASTER_ADDR and MASTER_PORT of the user have priority."""
    job, step = (os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ[TASKS_OF_SRUN],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port_of(f"{job}.{step}")),
    }


def port_of(job_id: str) -> int:
    """Return a port for a job, the same in all its processes."""
    return PORTS[zlib.crc32(job_id.encode()) % len(PORTS)]


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's form: `node07` of `node[07-09,12]-ib,login`, with the suffix `-ib`."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    assert found is not None  # every part may be empty
    return found[1] + (found[2] or "") + found[3]


def in_replica_order(places: Sequence[Place], *, span: int) -> list[Place]:
    """Return processes so that each replica, `span` processes in a row, lies on one node wherever it can.

    Nodes and processes keep their order otherwise. The process with rank 0 stays the first one.

    Args:
        span: the number of processes of a replica; it divides their number.
    """
    nodes: dict[str, list[Place]] = {}
    for place in sorted(places, key=lambda place: place.rank):
        nodes.setdefault(place.node, []).append(place)
    complete, rest = [], []
    for members in nodes.values():
        count = len(members) // span * span
        complete += members[:count]
        rest += members[count:]
    first_is_complete = bool(complete) and complete[0].rank == 0
    return complete + rest if first_is_complete else rest + complete


def describe_nodes(ordered: Sequence[Place], *, span: int) -> str:
    """Return a sentence about nodes and replicas; empty if there is one node."""
    nodes = list(dict.fromkeys(place.node for place in ordered))
    if len(nodes) == 1:
        return ""
    text = f"{len(ordered)} processes on {len(nodes)} nodes"
    if span == 1:
        return text
    replicas = [ordered[first : first + span] for first in range(0, len(ordered), span)]
    divided = sum(len({place.node for place in replica}) > 1 for replica in replicas)
    if not divided:
        return f"{text}; each replica is on one node"
    verb = "is" if divided == 1 else "are"
    return f"{text}; {divided} of {len(replicas)} replicas {verb} divided between nodes, which exchange BN's statistics"
