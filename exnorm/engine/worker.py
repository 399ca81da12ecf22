"""One worker: `python -m exnorm.engine.worker RUN_DIR` trains the run of a folder, on one device.

The controller starts one per device and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; so does the
user's `torchrun` over several nodes. A worker of the controller ends when its standard input closes, which happens
when the controller dies for any reason. Exit codes: 0 done, 2 the user's mistake, 3 another process uses the run,
128 + n after signal n.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from exnorm.config.errors import BUG, UserError, first_line
from exnorm.engine.shortage import shortage
from exnorm.runs.folder import RunFolder, RunLocked
from exnorm.runs.output import outlive_output, print_anything
from exnorm.runs.subprocesses import available_cores, end_with_parent, heeded_signals, workers_here

CONTROLLED = "EXNORM_CONTROLLED"  # set by the controller: watch standard input
ERROR_FILE = "EXNORM_ERROR_FILE"  # where a user's mistake is written for the controller to print
EXIT_USER_ERROR = 2
EXIT_LOCKED = 3


def main(arguments: list[str]) -> int:
    """Run a worker; return its exit code."""
    outlive_output()
    if os.environ.get(CONTROLLED):
        end_with_parent()
    print_anything()
    folder_name, *request = arguments
    received = _listen() if not request else []
    if request:  # an evaluation has nothing to save: it dies at once, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    import torch

    from exnorm.engine import checkpoint, distributed, train
    from exnorm.runs.counted_warnings import counted_warnings

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // workers_here()))
    folder = RunFolder(folder_name)
    try:
        config = checkpoint.read_config(folder)
        with counted_warnings(printed=os.environ.get("RANK", "0") == "0"):
            if request:
                _evaluate(folder, config, json.loads(request[0]))
            else:
                _train(folder, config, lambda: received[0] if received else 0)
    except train.Stopped as stopped:
        return 128 + stopped.signum
    except RunLocked as problem:
        _report(problem)
        return EXIT_LOCKED
    except UserError as problem:
        _report(problem)
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError as problem:
        less = "Use more trainer.passes, a smaller batch or trainer.precision=bf16, and no trainer.cuda_graph"
        _report(UserError(f"the memory of the GPU is full. {less} ({first_line(problem)})"))
        return EXIT_USER_ERROR
    except Exception as problem:
        line = shortage(problem, folder)
        if line is None:
            problem.add_note(BUG)
            raise
        _report(UserError(line))
        return EXIT_USER_ERROR
    finally:
        distributed.leave()
    return 0


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


def _train(folder: Any, config: Any, stop_signal: Any) -> None:
    from exnorm.engine import distributed
    from exnorm.engine.train import train

    is_first = os.environ.get("RANK", "0") == "0"
    lock = folder.lock() if is_first else None
    if is_first:
        _say_what_is_compiled()
    world = distributed.join(device_type(config.trainer.device))
    train(folder, config, world, stop_signal)
    world.wait()
    if lock is not None:
        lock.release()


def _say_what_is_compiled() -> None:
    log = logging.getLogger("exnorm")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(sys.stdout))


def _evaluate(folder: Any, config: Any, request: dict[str, Any]) -> None:
    from exnorm.engine import distributed
    from exnorm.engine.evaluate_run import evaluate_run

    world = distributed.join(device_type(request["device"]))
    evaluate_run(folder, config, request, world)


def _listen() -> list[int]:
    """Collect the signals that ask for an end; the training checks them between steps."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    for signum in heeded_signals():
        signal.signal(signum, note)
    return received


def _report(problem: UserError) -> None:
    error_file = os.environ.get(ERROR_FILE)
    if os.environ.get("EXNORM_TRACEBACK"):
        raise problem
    text = str(problem)
    if text.startswith("Caught "):  # a loader process sends its traceback along
        text = text.rpartition("UserError: ")[2]
    line = " ".join(text.split())
    if error_file:
        Path(error_file).write_text(line, encoding="utf-8", errors="surrogateescape")
    else:
        print(f"exnorm: error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
