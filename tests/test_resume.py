"""A run that can be killed at any moment: real processes, real signals, and the same bits in the end."""

import os
import random
import signal
from pathlib import Path

import pytest
from engine_cases import (
    WAIT_S,
    assert_same_run,
    checkpoints,
    last_state,
    make_image_folder,
    only_run,
    start,
    tiny,
    train,
    train_here,
    wait_for,
    workers,
)

pytestmark = pytest.mark.slow
EPOCHS = "trainer.epochs=4"  # of 6 steps
EVERY = "trainer.checkpoint_every_steps=2"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    return train_here(tiny(images, EPOCHS), tmp_path_factory.mktemp("whole"))


def kill_all(pids: list[int]) -> None:
    """SIGKILL to processes, some of which may be gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run_until_step(arguments: list[str], cwd: Path, step: int) -> tuple[int, object]:
    """Start a run and wait for a checkpoint of at least `step`; return the controller's pid and process."""
    cwd.mkdir(exist_ok=True)
    process = start(arguments, cwd)

    def reached() -> bool:
        found = [path for path in cwd.glob("runs/*/*/checkpoints/step-*.pt") if int(path.stem[5:]) >= step]
        return bool(found) or process.poll() is not None

    wait_for(reached, f"step {step}")
    assert process.poll() is None, "the run ended before it could be killed"
    return process.pid, process


@pytest.mark.parametrize(("devices", "backend"), [(1, "eager"), (2, "eager"), (1, "compiled")])
def test_a_run_killed_inside_an_epoch_ends_bit_equal(devices: int, backend: str, images: Path, tmp_path: Path) -> None:
    """SIGKILL to controller and workers at a random step, twice; then on with two data workers."""
    batch = ["batch=2x4", f"trainer.devices={devices}", EPOCHS, f"ops.backend={backend}"]
    whole = train_here(tiny(images, *batch), tmp_path / "whole")
    killed = tmp_path / "killed"
    draw = random.Random(devices)
    for step in (draw.randrange(2, 6), draw.randrange(8, 16)):
        pid, process = run_until_step(tiny(images, *batch, EVERY), killed, step)
        kill_all([*workers(str(killed)), pid])
        process.communicate()  # type: ignore[attr-defined]
        wait_for(lambda: not workers(str(killed)), "the workers' end")
        assert last_state(only_run(killed))["step"] < 24
    resumed = train(tiny(images, *batch, EVERY, "data.workers=2"), killed)
    assert_same_run(whole, resumed)


def test_killing_the_controller_leaves_no_worker_alive(images: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "orphans"
    arguments = tiny(images, "batch=2x4", "trainer.devices=2", "trainer.epochs=500", "data.workers=1", EVERY)
    pid, process = run_until_step(arguments, cwd, 2)
    assert len(workers(str(cwd))) >= 2
    os.kill(pid, signal.SIGKILL)
    process.communicate()  # type: ignore[attr-defined]
    wait_for(lambda: not workers(str(cwd)), "the workers' end")


@pytest.mark.parametrize(
    ("signum", "code", "everyone"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    signum: int, code: int, everyone: bool, images: Path, whole: Path, tmp_path: Path
) -> None:
    """To the controller alone, or to every process of the job, its loaders too."""
    cwd = tmp_path / "stopped"
    pid, process = run_until_step(tiny(images, EPOCHS, EVERY, "data.workers=2"), cwd, 2)
    for target in [*(workers(str(cwd)) if everyone else []), pid]:
        os.kill(target, signum)
    _, err = process.communicate(timeout=WAIT_S)  # type: ignore[attr-defined]
    assert process.returncode == code, err  # type: ignore[attr-defined]
    assert "Traceback" not in err
    assert not (only_run(cwd) / "record.json").exists()
    assert checkpoints(only_run(cwd))
    assert_same_run(whole, train_here(tiny(images, EPOCHS, EVERY), cwd))


def test_a_worker_that_was_killed_is_named_and_the_run_can_go_on(images: Path, tmp_path: Path) -> None:
    """As by the kernel when memory runs out: the other worker ends too, in one line."""
    cwd = tmp_path / "killed"
    arguments = tiny(images, "batch=2x4", "trainer.devices=2", EPOCHS, EVERY)
    _, process = run_until_step(arguments, cwd, 2)
    (second,) = (pid for pid in workers(str(cwd)) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=WAIT_S)  # type: ignore[attr-defined]
    assert process.returncode == 2  # type: ignore[attr-defined]
    assert "worker 1 was killed by SIGKILL" in err.splitlines()[-1]
    assert "the same command resumes the run" in (only_run(cwd) / "error.txt").read_text()
    assert not workers(str(cwd))
    assert (train_here(arguments, cwd) / "record.json").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_said_to_resume(images: Path, tmp_path: Path) -> None:
    process = start(tiny(images), tmp_path)
    (worker,) = wait_for(lambda: workers(str(tmp_path)), "the worker")
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert "was killed by SIGKILL; the same command starts the run again" in err and "resumes" not in err


def test_the_second_of_two_starts_says_who_has_the_run_and_leaves(images: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "twice"
    arguments = tiny(images, "trainer.epochs=500", EVERY)
    pid, process = run_until_step(arguments, cwd, 2)
    second = start(arguments, cwd)
    _, err = second.communicate(timeout=WAIT_S)
    assert second.returncode == 2
    assert "is in use by process" in err
    assert len(err.splitlines()) == 1
    assert process.poll() is None  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=WAIT_S)  # type: ignore[attr-defined]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(images: Path, whole: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "damaged"
    pid, process = run_until_step(tiny(images, EPOCHS, EVERY), cwd, 4)
    kill_all([*workers(str(cwd)), pid])
    process.communicate()  # type: ignore[attr-defined]
    wait_for(lambda: not workers(str(cwd)), "the workers' end")
    last = checkpoints(only_run(cwd))[-1]
    last.write_bytes(last.read_bytes()[:-2000])
    assert_same_run(whole, train_here(tiny(images, EPOCHS, EVERY), cwd))
