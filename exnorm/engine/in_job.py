"""Training in a job (`exnorm.engine.job`): the process with rank 0 leads, the others follow.

The leader does what the controller does on one machine: it reads the command, finds or makes the run folder, prints and
records. The others take the folder, with its configuration, from the leader. All need to see that folder: `runs` is on
a file system that the nodes share. Each process trains as a worker of a controller does.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

from exnorm.config.errors import BUG, UserError, first_line
from exnorm.engine.job import Place, describe_nodes, in_replica_order
from exnorm.engine.lifeline import EXIT_FAILED, GRACE_S, Follower, Leader
from exnorm.engine.processes import CUBLAS, say_stopped, then
from exnorm.engine.stopping import Stopped, StopRequests
from exnorm.engine.worker import in_one_line, shortages_explained, train_run
from exnorm.runs.folder import RunFolder, wait_for_shared, write_text_atomic
from exnorm.runs.imports import uncollected

JOIN_S = 1800  # until all processes of a job have come
ADDRESS = "exnorm/leader"  # where the leader writes its port and token
RETRY_S = 0.5


class Job:
    """The job that this process leads: its place, the store of torch, and the connections to the other processes."""

    def __init__(self, place: Place) -> None:
        self.place, self.store = place, _meet(place)
        self.leader = Leader(place.size)
        self.store.set(ADDRESS, f"{self.leader.port} {self.leader.token}")

    def check(self) -> None:
        """Wait until all processes have come.

        Raises:
            UserError: one failed or did not come in time, or has other settings.
        """
        size, others = self.place.size, self.leader.followers(JOIN_S)
        if cause := self.leader.cause():
            raise UserError(cause)
        if len(others) < size - 1:
            raise UserError(
                f"only {1 + len(others)} of {size} processes have come to {self.place.host} at port "
                f"{self.leader.port}. The ports from 1024 up have to be open between the nodes"
            )
        for other in others:
            if other.words and list(other.words) != list(self.place.words):
                raise UserError(
                    f"rank {other.rank} has other settings than rank 0: {' '.join(other.words)}. The processes of a "
                    "job train one run together. For runs of their own, start them with env -u SLURM_STEP_NUM_TASKS"
                )


_jobs: list[Job] = []  # at most one


@contextmanager
def leading(place: Place) -> Iterator[None]:
    """Lead a job inside the block, in which one run may be trained. At its end the other processes end, too."""
    job = Job(place)
    _jobs.append(job)
    message: dict[str, Any] = {"failed": "rank 0 failed"}
    try:
        job.check()
        yield
        message = {"end": True}
    except SystemExit as end:
        if not end.code:
            message = {"end": True}
        raise
    finally:
        job.leader.end(message)
        _jobs.clear()


def current_job() -> Job | None:
    """Return the job that this process leads, or None."""
    return _jobs[0] if _jobs else None


def train_as_leader(job: Job, folder: RunFolder, device: str, *, span: int) -> None:
    """Train the run of a folder with all processes of the job.

    Args:
        device: cuda or cpu, for all processes.
        span: the number of processes of a replica.

    Raises:
        UserError: a setting cannot work, or another process failed.
        SystemExit: the run stopped early, with a checkpoint.
    """
    with uncollected():
        from exnorm.engine import checkpoint, distributed

    config = checkpoint.read_config(folder)
    ordered = in_replica_order([job.place, *job.leader.followers(0)], span=span)
    nodes = [place.node for place in ordered]
    for rank, place in enumerate(ordered):
        message = {
            "folder": str(folder.path.resolve()),
            "device": device,
            "rank": rank,
            "here": nodes.count(place.node),
            "deterministic": config.trainer.deterministic,
        }
        if place.rank > 0:
            job.leader.send(place.rank, {"train": message})
        else:
            _set_environment(message)
    if text := describe_nodes(ordered, span=span):
        print(text, flush=True)
    job.leader.on_loss = partial(_keep_error, folder)
    try:
        with shortages_explained(folder):
            join = partial(_join, job.store, job.leader.token)
            train_run(folder, config, device, StopRequests(leads=True), join)
        distributed.leave()
    except Stopped as stopped:
        distributed.leave()
        say_stopped(folder, stopped.exit_code)
        raise SystemExit(stopped.exit_code) from None
    except UserError:
        raise
    except Exception:
        cause = job.leader.cause(GRACE_S)  # if a process is lost, the exchange with it fails here, too
        if cause is None:
            raise
        raise UserError(f"{cause}{then(folder)}") from None


def follow(place: Place) -> int:
    """Do what the leader of the job says, and return the exit code. The leader prints why a job ends."""
    try:
        store = _meet(place)
        follower = _find_leader(place, store)
    except UserError as problem:
        print(f"exnorm: error: rank {place.rank} on {place.host}: {problem}", file=sys.stderr)
        return EXIT_FAILED
    from exnorm.engine import distributed

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it trains, Ctrl-C ends it without a traceback
    message = follower.receive()
    if "train" not in message:
        return 0 if "end" in message else EXIT_FAILED
    try:
        _follow_in_training(message["train"], partial(_join, store, follower.token))
    except Stopped as stopped:
        code = stopped.exit_code
    except UserError as problem:
        follower.fail(in_one_line(problem))
        return EXIT_FAILED
    except Exception as problem:  # noqa: BLE001 - printed below, unless it follows from the failure of another process
        if not follower.job_has_failed(GRACE_S):
            follower.fail(f"{type(problem).__name__}: {first_line(problem)}")
            problem.add_note(BUG)
            traceback.print_exception(problem)
        return EXIT_FAILED
    else:
        code = 0
    distributed.leave()
    follower.done()
    return code


def _find_leader(place: Place, store: Any) -> Follower:
    """Return a connection to the leader, whose address is in the store.

    A launcher that starts the processes anew keeps its store. So the address may be that of a leader who has gone.

    Raises:
        UserError: there is no leader for JOIN_S.
    """
    end = time.monotonic() + JOIN_S
    while True:
        try:
            port, token = store.get(ADDRESS).decode().split()
            return Follower(place, os.environ["MASTER_ADDR"], int(port), token)
        except (OSError, RuntimeError) as problem:  # the store's errors are RuntimeErrors
            if time.monotonic() > end:
                raise UserError(f"rank 0 cannot be reached ({first_line(problem)})") from None
        time.sleep(RETRY_S)


def _follow_in_training(message: dict[str, Any], join: Callable[[str], Any]) -> None:
    with uncollected():
        from exnorm.engine import checkpoint

    folder = RunFolder(message["folder"])
    _set_environment(message)
    if not wait_for_shared(folder.config_file):
        raise UserError(f"{folder.path} is not here. Put the runs where all nodes see them, with runs=DIR")
    with shortages_explained(folder):
        config = checkpoint.read_config(folder)
        train_run(folder, config, message["device"], StopRequests(), join)


def _set_environment(message: dict[str, Any]) -> None:
    """Set this worker's rank, which may differ from the rank of its process, and the number of workers on its node."""
    os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(message["rank"]), str(message["here"])
    if message["deterministic"]:
        os.environ.update(CUBLAS)


def _meet(place: Place) -> Any:
    """Return the store of torch that all processes of the job share, once all have come.

    Raises:
        UserError: they have not come in time.
    """
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except (dist.DistError, RuntimeError, OSError) as problem:
        raise UserError(
            f"the {place.size} processes of this job do not find each other at MASTER_ADDR="
            f"{os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']} ({first_line(problem)})"
        ) from None
    return store


def _join(store: Any, token: str, device: str) -> Any:
    import torch.distributed as dist

    from exnorm.engine import distributed

    return distributed.join(device, store=dist.PrefixStore(f"exnorm/{token}", store))


def _keep_error(folder: RunFolder, cause: str) -> None:
    with suppress(OSError):
        write_text_atomic(folder.error_file, f"{cause}\n")
