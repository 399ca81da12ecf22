"""One worker: `python -m exnorm.engine.worker RUN_DIR` trains the run of a folder, on one device.

The controller starts one per device and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A worker ends
when its standard input closes, which happens when the controller dies for any reason. Exit codes: 0 done, 2 the user's
mistake, 3 another process uses the run, 75 its time is up, 128 + n after signal n. In a job (`exnorm.engine.in_job`)
there is no controller, and the process that reads the command is a worker itself.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exnorm.config.errors import BUG, UserError, first_line
from exnorm.engine.shortage import is_lost_worker, shortage
from exnorm.engine.stopping import Stopped, StopRequests
from exnorm.runs.folder import RunFolder, RunLocked
from exnorm.runs.imports import uncollected
from exnorm.runs.output import outlive_output, print_anything
from exnorm.runs.subprocesses import available_cores, end_with_parent, workers_here

CONTROLLED = "EXNORM_CONTROLLED"  # set by the controller: watch standard input
ERROR_FILE = "EXNORM_ERROR_FILE"  # where a user's mistake is written for the controller to print
EXIT_USER_ERROR = 2
EXIT_LOCKED = 3
LOST_WAIT_S = 60.0  # after the loss of another worker, until this one ends itself; above GRACE_S of the controller


def main(arguments: list[str]) -> int:
    """Run a worker of a controller; return its exit code."""
    outlive_output()
    if os.environ.get(CONTROLLED):
        end_with_parent()
    print_anything()
    folder_name, *request = arguments
    if request:  # an evaluation has nothing to save: it dies at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    stop_requests = None if request else StopRequests()
    if stop_requests is not None:
        stop_requests.listen()

    with uncollected():
        from exnorm.engine import checkpoint, distributed

    folder = RunFolder(folder_name)
    try:
        with shortages_explained(folder):
            config = checkpoint.read_config(folder)
            if stop_requests is None:
                _evaluate(folder, config, json.loads(request[0]))
            else:
                train_run(folder, config, config.trainer.device, stop_requests, distributed.join)
    except Stopped as stopped:
        return stopped.exit_code
    except RunLocked as problem:
        _report(problem)
        return EXIT_LOCKED
    except UserError as problem:
        _report(problem)
        return EXIT_USER_ERROR
    except Exception as problem:
        if is_lost_worker(problem):
            time.sleep(LOST_WAIT_S)  # the worker that failed first has the reason; its line is the only one
        problem.add_note(BUG)
        raise
    finally:
        distributed.leave()
    return 0


@contextmanager
def shortages_explained(folder: RunFolder) -> Iterator[None]:
    """Raise UserError, a line that says what to type, where a machine runs out of memory, disk or open files."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        less = "Use more trainer.passes, a smaller batch or trainer.precision=bf16, and no trainer.cuda_graph"
        raise UserError(f"the memory of the GPU is full. {less} ({first_line(problem)})") from None
    except (OSError, RuntimeError) as problem:
        line = shortage(problem, folder)
        if line is None:
            raise
        raise UserError(line) from None


def train_run(
    folder: RunFolder, config: Any, device: str, stop_requests: StopRequests, join: Callable[[str], Any]
) -> None:
    """Train the run of a folder in this process, whose rank is in RANK. The first worker holds the folder's lock.

    Args:
        join: joins the other workers; its argument is `cuda` or `cpu`.
    """
    from exnorm.engine.train import train
    from exnorm.runs.counted_warnings import counted_warnings

    is_first = os.environ.get("RANK", "0") == "0"
    lock = folder.lock() if is_first else None
    try:
        if is_first:
            _say_what_is_compiled()
        with counted_warnings(printed=is_first):
            _share_cores()
            world = join(device_type(device))
            stop_requests.listen()
            stop_requests.limit(config.trainer.max_hours)
            train(folder, config, world, stop_requests)
            world.wait()
    finally:
        if lock is not None:
            lock.release()


def device_type(wanted: str) -> str:
    """Return `cuda` or `cpu`; `auto` takes a GPU if there is one.

    Raises:
        UserError: the setting is `cuda` and there is no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda needs a GPU, but torch finds no GPU. Type device=cpu to use the CPU")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _share_cores() -> None:
    """Take an equal share of the cores, unless the user has chosen a number."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // workers_here()))


def _say_what_is_compiled() -> None:
    log = logging.getLogger("exnorm")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(sys.stdout))


def _evaluate(folder: Any, config: Any, request: dict[str, Any]) -> None:
    from exnorm.engine import distributed
    from exnorm.engine.evaluate_run import evaluate_run
    from exnorm.runs.counted_warnings import counted_warnings

    with counted_warnings(printed=os.environ.get("RANK", "0") == "0"):
        _share_cores()
        world = distributed.join(device_type(request["device"]))
        evaluate_run(folder, config, request, world)


def _report(problem: UserError) -> None:
    error_file = os.environ.get(ERROR_FILE)
    if os.environ.get("EXNORM_TRACEBACK"):
        raise problem
    line = in_one_line(problem)
    if error_file:
        Path(error_file).write_text(line, encoding="utf-8", errors="surrogateescape")
    else:
        print(f"exnorm: error: {line}", file=sys.stderr, flush=True)


def in_one_line(problem: UserError) -> str:
    """Return the message of a user's mistake. A loader process sends its traceback along, which is left out."""
    text = str(problem)
    if text.startswith("Caught "):
        text = text.rpartition("UserError: ")[2]
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
