"""Converted models inside other people's tools, each as its documentation says."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from conftest import varied
from process_cases import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import exnorm
from exnorm.norms import Norm

torch.set_num_threads(1)
WORLD = 2
NORMS = ("bn", "gn", "sn", "en")


def block(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def small_network() -> nn.Module:
    """Two stages and a classifier."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return nn.Sequential(block(32), nn.Conv2d(32, 3, 1), block(32), tail)


def losses(model: nn.Module, rank: int = 0) -> list[float]:
    """The losses of three steps; each rank has images of its own."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def in_process(rank: int, port: int, folder: str) -> None:
    """One of two processes: the losses with FSDP2 and with DDP."""
    exnorm.ops.set_backend("eager")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    mesh, results = init_device_mesh("cpu", (WORLD,)), {}
    for norm in NORMS:
        model = exnorm.convert(small_network(), norm)
        whole = DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
        for part in list(model):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        images = torch.randn(2, 3, 16, 16)
        found = [losses(model, rank), losses(whole, rank)]
        results[norm] = found, torch.stack([net.eval()(images).detach() for net in (model, whole)])
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_trains_as_ddp_does(tmp_path: Path) -> None:
    """Parameters in shards: the same losses, and the same outputs in evaluation."""
    for of_rank in in_processes(in_process, WORLD, tmp_path):
        for (sharded, whole), outputs in of_rank.values():
            assert sharded == pytest.approx(whole, rel=1e-5) and len(set(whole)) == 3
            torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_torchs_average_of_weights_has_the_running_statistics(norm: str) -> None:
    """`AveragedModel(use_buffers=True)`, after which `exnorm.recalibrate` is not needed."""
    model = exnorm.convert(small_network(), norm)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    states = []
    for _ in range(3):
        losses(model)
        average.update_parameters(model)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.25 * states[0][name] + 0.25 * states[1][name] + 0.5 * states[2][name]
            torch.testing.assert_close(value, expected, msg=name)
    average.eval()(torch.randn(2, 3, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("norm", varied(NORMS, always=["en"]))
def test_a_detector_of_torchvision_trains(norm: str) -> None:
    """Boxes in, losses and gradients out; in evaluation boxes, also for an image without any."""
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    model = exnorm.convert(model, norm)
    image = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    loss = sum(model([image, image], [target, nothing]).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = [p.grad for m in model.modules() if isinstance(m, Norm) for p in m.parameters(recurse=False)]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)
    (found,) = model.eval()([image])
    assert found["boxes"].shape[1] == 4


def test_timms_pattern() -> None:
    """As in timm's `train.py`: create, convert, groups of parameters, EMA, DDP-ready, channels_last, features."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    model = exnorm.convert(timm.create_model("test_resnet", num_classes=5), "en").to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)).square().mean()
    loss.backward()
    optimizer.step()
    ema.update(model)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[name] + model.state_dict()[name]) / 2, msg=name)
    features = timm.create_model("test_resnet", features_only=True)
    assert len(exnorm.convert(features, "en").eval()(torch.randn(1, 3, 32, 32))) == len(
        features.feature_info.channels()
    )
