"""The meaning of a batch setting: what fits, what does not, and what a run says about it."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from torch import nn

from exnorm.config.errors import UserError
from exnorm.engine.batch import fitting_devices, parse_batch, plan_batch
from exnorm.engine.step import choose_passes, run_passes
from exnorm.norms import BatchNorm


@pytest.mark.parametrize("text", ["8x0", "0x8", "abc", "8", "8x", "x8", "8*4", "-1x8", "8x4.5", "08x4", ""])
def test_what_is_no_batch_setting_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"batch=8x32"):
        parse_batch(text)


@pytest.mark.parametrize(
    ("devices", "passes", "line"),
    [
        (1, 1, "batch 8x32: gradient over 256 samples, BN's scope 32, on 1 device as 8 virtual replicas"),
        (1, 4, "batch 8x32: gradient over 256 samples, BN's scope 32, on 1 device as 8 virtual replicas in 4 passes"),
        (4, 1, "batch 8x32: gradient over 256 samples, BN's scope 32, on 4 devices as 2 virtual replicas each"),
        (8, 1, "batch 8x32: gradient over 256 samples, BN's scope 32, on 8 devices"),
        (16, 1, "batch 8x32: gradient over 256 samples, BN's scope 32, on 16 devices, 2 to a replica"),
    ],
)
def test_a_plan_says_where_the_replicas_lie(devices: int, passes: int, line: str) -> None:
    assert plan_batch("8x32", devices=devices, passes=passes).describe() == line


def test_sync_widens_the_scope_to_the_whole_batch() -> None:
    assert plan_batch("8x32", devices=2, sync=True).scope == 256


@pytest.mark.parametrize(("text", "devices"), [("8x32", 3), ("8x32", 0), ("1x8", 3), ("2x3", 4), ("3x8", 2)])
def test_devices_that_do_not_fit_are_refused_with_those_that_do(text: str, devices: int) -> None:
    replicas, samples = parse_batch(text)
    counts = ", ".join(map(str, fitting_devices(replicas, samples, limit=replicas * samples)))
    with pytest.raises(UserError, match=f"can be {counts}"):
        plan_batch(text, devices=devices)


def test_every_device_count_that_fits_gives_whole_shares() -> None:
    for devices in fitting_devices(6, 4, limit=24):
        plan = plan_batch("6x4", devices=devices)
        assert plan.total % devices == 0
        share = plan.total // devices
        assert share == plan.replicas_per_device * plan.samples or share * plan.span == plan.samples


@pytest.mark.parametrize("passes", [0, 3, 5, 16])
def test_passes_must_divide_the_replicas_of_a_device(passes: int) -> None:
    with pytest.raises(UserError, match="can be 1, 2, 4, 8"):
        plan_batch("8x4", devices=1, passes=passes)


def test_a_synchronized_scope_over_several_passes_is_impossible() -> None:
    with pytest.raises(UserError, match="trainer.passes=1"):
        plan_batch("8x4", devices=1, passes=2, sync=True)


def test_a_cuda_graph_refuses_statistics_that_gpus_exchange() -> None:
    layer = BatchNorm(4)
    layer.group = object()
    learner = SimpleNamespace(model=nn.Sequential(layer), plan=plan_batch("1x32", devices=2))
    config = OmegaConf.create({"trainer": {"cuda_graph": True}})
    with pytest.raises(UserError, match="BN's scope of 32 samples spans several"):
        choose_passes(config, learner)  # type: ignore[arg-type]
    config.trainer.cuda_graph = False
    assert choose_passes(config, learner) is run_passes  # type: ignore[arg-type]
