"""A tiny data set, a tiny network and the runs that the tests of the engine start, as real processes."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from conftest import ROOT, TIMEOUT_S
from omegaconf import OmegaConf
from PIL import Image
from process_cases import free_port, run_forked

from exnorm import ops
from exnorm.config.compose import compose_train
from exnorm.config.groups import option_values
from exnorm.engine import checkpoint, distributed, launch, worker
from exnorm.engine import train as engine
from exnorm.engine.evaluate_run import evaluate_run
from exnorm.runs.folder import RunFolder
from exnorm.runs.identity import run_dir
from exnorm.tasks import Task, make_task

CLASSES = ("cat", "dog", "elk")
TIMES = ("images_per_s",)  # the metrics that two equal runs may differ in
WAIT_S = TIMEOUT_S


def make_image_folder(root: Path, *, train: int = 16, val: int = 7) -> Path:
    """Write train/<class>/ and val/<class>/ with small PNG and JPEG images of noise around a colour of the class."""
    draw = random.Random(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = bytes(
                    min(255, draw.randrange(160) + 90 * (channel == label))
                    for _ in range(20 * 18)
                    for channel in range(3)
                )
                image = Image.frombytes("RGB", (20, 18), pixels)
                image.save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return root


def tiny(root: Path, *more: str) -> list[str]:
    """Arguments of a training of seconds; `more` comes last and wins."""
    return [
        "train",
        "model=resnet18",
        "model.name=test_resnet",
        "data=imagefolder",
        f"data.root={root}",
        "data.image_size=32",
        "data.resize=32",
        "data.workers=0",
        "logger=off",
        "trainer.epochs=2",
        "batch=1x8",
        "ops.backend=eager",
        *more,
    ]


def classification(*, classes: int) -> Task:
    """The task of classification with its usual options."""
    return make_task(option_values("task", "classification"), [str(label) for label in range(classes)])


def environment() -> dict[str, str]:
    """The environment of a run: this checkout first, one thread per worker so that sums have one order."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(
    arguments: list[str], cwd: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """Start `exnorm ARGUMENTS`, with further variables of the environment, and return at once."""
    return start_module(["exnorm", *arguments], cwd, variables)


def start_module(words: list[str], cwd: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start `python -m WORDS` and return at once."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment() | dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_code(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start Python with some code, which may import the modules of tests/."""
    command, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
    paths = os.pathsep.join([str(ROOT / "tests"), environment()["PYTHONPATH"]])
    return subprocess.Popen(command, env=environment() | {"PYTHONPATH": paths}, stdout=pipe, stderr=pipe, text=True)


def train(arguments: list[str], cwd: Path) -> Path:
    """Run a training to its end and return its run folder."""
    cwd.mkdir(exist_ok=True)
    process = start(arguments, cwd)
    out, err = process.communicate(timeout=2 * WAIT_S)
    assert process.returncode == 0, err
    return cwd / next(line.split(": ")[1] for line in out.splitlines() if line.startswith("run folder: "))


def train_here(arguments: list[str], cwd: Path) -> Path:
    """`train` without starting Python and importing torch, which takes longer than what most tests train.

    One worker works in this process, several in processes that fork from one that has imported everything.
    """
    cwd.mkdir(exist_ok=True)
    config = compose_train(arguments[1:])
    values: Any = OmegaConf.to_container(config, resolve=True)
    with contextlib.chdir(cwd), working_here():
        launch.run(config)
        return cwd / run_dir(values, hash8=launch.identity(config, values))


@contextlib.contextmanager
def working_here() -> Iterator[None]:
    """Workers are no commands; they have one thread each."""
    backend, threads = ops.get_backend(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(launch, "run_workers", _work):
            yield
    finally:
        ops.set_backend(backend)
        torch.set_num_threads(threads)


def _work(arguments: list[str], *, count: int, **_: Any) -> None:
    """What the workers of a training or an evaluation do."""
    if count > 1:
        run_forked(_work_as, count, count, free_port(), arguments)
        return
    folder = RunFolder(arguments[0])
    config, world = checkpoint.read_config(folder), distributed.join("cpu")
    if len(arguments) == 1:
        engine.train(folder, config, world, lambda: 0)
    else:
        evaluate_run(folder, config, json.loads(arguments[1]), world)


def _work_as(rank: int, count: int, port: int, arguments: list[str]) -> None:
    """What the command of a worker does."""
    size = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in size.items()} | {"MASTER_ADDR": "127.0.0.1"}
    assert worker.main(arguments) == 0


def only_run(cwd: Path) -> Path:
    """The one run folder below a folder."""
    (config,) = (cwd / "runs").glob("*/*/config.yaml")
    return config.parent


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints by step, the last one last."""
    return sorted((run / "checkpoints").glob("step-*.pt"))


def last_state(run: Path) -> dict[str, Any]:
    """The content of the last checkpoint."""
    return torch.load(checkpoints(run)[-1], weights_only=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_bit_equal(left: Any, right: Any, where: str = "") -> None:
    """Two nested states are equal to the last bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            if key != "train_s":
                assert_bit_equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_bit_equal(a, b, f"{where}/{index}")
    else:
        assert left == right, where


def assert_same_run(left: Path, right: Path) -> None:
    """Two runs ended with the same weights, optimizer, buffers and metrics, to the last bit."""
    assert_bit_equal(last_state(left), last_state(right))
    assert metrics(left) == metrics(right)


def wait_for(condition: Any, what: str) -> Any:
    """Poll until the condition holds and return its value."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S} s for {what}")


def workers(marker: str) -> list[int]:
    """The processes that run the worker, or fork from it, in a folder whose path holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="ignore")
                cwd = os.readlink(entry / "cwd")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if "exnorm.engine.worker" in command and marker in cwd and state != "Z":
                found.append(int(entry.name))
    return found
