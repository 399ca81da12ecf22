"""A batch setting fixes the mathematics: the same gradients and running statistics on any devices and passes."""

import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import last_state, make_image_folder, tiny, train_here
from process_cases import in_processes

from exnorm.engine.distributed import join, leave
from exnorm.engine.step import average_gradients

pytestmark = pytest.mark.slow
ROUNDING = 1e-3  # of a tensor's largest value; up to 6e-5 was seen, and another scope of BN differs by tenths
# One step of SGD from equal weights: what the weights moved by is the gradient times the rate.
ONE_STEP = ("trainer.epochs=1", "optim.lr=1.0", "optim.momentum=0", "optim.weight_decay=0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training images: one step of 32."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images", train=12, val=1)


def state_after_a_step(images: Path, cwd: Path, *more: str) -> dict[str, Any]:
    """Weights and buffers after one optimizer step."""
    state = last_state(train_here(tiny(images, *ONE_STEP, *more), cwd))
    assert state["step"] == 1
    return state["model"]


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Equal up to the rounding of float32 sums taken in another order, which small batches amplify."""
    assert left.keys() == right.keys()
    for name in left:
        scale = left[name].abs().max().clamp(min=1e-3)
        assert torch.allclose(left[name] / scale, right[name] / scale, atol=ROUNDING), name


@pytest.mark.parametrize("norm", ["bn", "en"])
def test_8x4_is_one_experiment_in_passes_and_on_devices(norm: str, images: Path, tmp_path: Path) -> None:
    setting = [f"norm={norm}", "batch=8x4"]
    once = state_after_a_step(images, tmp_path / "once", *setting)
    for devices, passes in ((1, 2), (1, 8), (2, 1), (2, 2), (4, 1)):
        other = [f"trainer.devices={devices}", f"trainer.passes={passes}"]
        assert_close(once, state_after_a_step(images, tmp_path / f"{devices}-{passes}", *setting, *other))
    whole = state_after_a_step(images, tmp_path / "whole", f"norm={norm}", "batch=1x32")
    with pytest.raises(AssertionError):  # another scope of BN is another experiment
        assert_close(once, whole)


@pytest.mark.parametrize("norm", ["bn", "sn", "en"])
def test_a_replica_may_span_two_devices(norm: str, images: Path, tmp_path: Path) -> None:
    setting = [f"norm={norm}", "batch=1x32"]
    one = state_after_a_step(images, tmp_path / "one", *setting)
    assert_close(one, state_after_a_step(images, tmp_path / "two", *setting, "trainer.devices=2"))


def test_sync_is_one_scope_over_all_devices(images: Path, tmp_path: Path) -> None:
    one = state_after_a_step(images, tmp_path / "one", "norm=en", "batch=1x32")
    for devices in (1, 2):
        synced = ["norm=en", "batch=2x16", "norm.sync=true", f"trainer.devices={devices}"]
        assert_close(one, state_after_a_step(images, tmp_path / f"synced-{devices}", *synced))


KINDS = ("plain", "ddp", "compiled ddp")


def gradients_in_process(rank: int, port: int, folder: str) -> None:
    """One of two processes: the gradients of two passes, for each way to average them, written to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    world = join("cpu")
    gradients = []
    for kind in KINDS:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ddp = None if kind == "plain" else torch.nn.parallel.DistributedDataParallel(model)
        net = ddp or model
        if kind == "compiled ddp":
            net = torch.compile(net, backend="aot_eager")
        torch.manual_seed(rank)
        for last in (False, True):
            with nullcontext() if ddp is None or last else ddp.no_sync():
                net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        if ddp is None:
            average_gradients(model, world)
        gradients.append([parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None])
    torch.save(gradients, Path(folder) / f"{rank}.pt")
    leave()


def test_gradients_are_averaged_alike_behind_a_graph_by_ddp_and_by_compiled_ddp(tmp_path: Path) -> None:
    found = in_processes(gradients_in_process, 2, tmp_path)
    for left, right in itertools.combinations([kind for gradients in found for kind in gradients], 2):
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-7)
