"""On a GPU: every normalizer and back end against float64 on the CPU, and the training loop. `scripts/gpu_visit.py`."""

import contextlib
import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import make_image_folder, metrics, tiny, train
from norm_cases import NORMS, build
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms import commit_running_stats, configure_scope
from exnorm.surgery import convert, norm_class

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
BACKENDS = ("eager", "triton")


@pytest.fixture(autouse=True)
def backend_as_before() -> Iterator[None]:
    before = ops.get_backend()
    yield
    ops.set_backend(before)


def error(value: Tensor, exact: Tensor, least: float = 1e-6) -> float:
    """The relative error in the 2-norm, of a norm that counts as `least` where it is smaller."""
    exact = exact.detach().double().cpu()
    return float((value.detach().double().cpu() - exact).norm() / exact.norm().clamp(min=least))


def results(layer: nn.Module, x: Tensor, residual: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, residual)
    y.backward(grad)
    found = {"y": y, "dx": x.grad, **{n: p.grad for n, p in layer.named_parameters()}, **dict(layer.named_buffers())}
    if residual is not None:
        found["dresidual"] = residual.grad
    return {name: value for name, value in found.items() if value is not None}


CASES = [
    # shape, channels last, residual, activation, replicas
    ((4, 64, 7, 7), True, False, "relu", 1),
    ((4, 64, 7, 7), True, True, "relu", 2),
    ((3, 48, 9, 5), False, False, "silu", 1),
    ((3, 48, 9, 5), False, True, None, 1),
    ((2, 64, 56, 56), True, True, "relu", 1),
    ((5, 96, 33), False, False, "gelu", 1),
    ((2, 32, 3, 8, 9), False, False, "hardswish", 1),
    ((66, 64), False, False, None, 1),
]


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise where the host waits for the device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a prototype"
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_is_what_float64_says(norm: str, backend: str, training: bool) -> None:
    for shape, last, add, act, replicas in CASES:
        if norm == "in" and len(shape) == 2:
            continue  # refused
        layer = build(norm, shape[1], dtype=torch.float32, act=act).train(training)
        configure_scope(layer, replicas=replicas)
        for dtype, tolerance in TOLERANCE.items():
            generator = torch.Generator().manual_seed(0)
            x, residual, grad = (torch.randn(shape, generator=generator) * 2 + 3 for _ in range(3))
            values = [t.to(dtype).cuda() for t in (x, residual, grad)]
            if last:
                values = [t.contiguous(memory_format=torch.channels_last) for t in values]
            exact_layer = copy.deepcopy(layer).double()
            eager_layer, on_gpu = copy.deepcopy(layer), copy.deepcopy(layer).cuda()
            for each in (exact_layer, eager_layer, on_gpu):
                configure_scope(each, replicas=replicas)
            ops.set_backend("eager")
            exact, single = [t.double().cpu() for t in values], [t.cpu() for t in values]
            expected = results(exact_layer, exact[0], exact[1] if add else None, exact[2])
            eager = results(eager_layer, single[0], single[1] if add else None, single[2])
            assert ops.set_backend(backend) == backend
            found = results(on_gpu, values[0], values[1] if add else None, values[2])
            # Where rounding decides, as in a difference of large terms, eager layers on the CPU show how far it goes.
            least = 1e-5 * float(expected["dx"].norm())  # the gradient of EN's ratios is 0 if all statistics are equal
            allowed = {n: max(tolerance, 4 * error(eager[n], value, least)) for n, value in expected.items()}
            errors = {n: error(found[n], value, least) for n, value in expected.items()}
            large = {name: (value, allowed[name]) for name, value in errors.items() if not value <= allowed[name]}
            assert not large, (norm, shape, last, add, act, replicas, dtype, large)
            assert found["y"].stride() == values[0].stride()


def test_triton_repeats_bit_for_bit() -> None:
    ops.set_backend("triton")
    for norm in NORMS:
        layer = build(norm, 64, dtype=torch.float32, act="relu").cuda()
        x = torch.randn(32, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(x)
        first, second = (results(copy.deepcopy(layer), x, None, grad) for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def small_model(norm: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    convert(model, norm)
    configure_scope(model)
    return model.to(device="cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]


def steps(model: nn.Module, net: nn.Module, count: int, *, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    generator = torch.Generator("cuda").manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(count):
        x = torch.randn(8, 3, 64, 64, device="cuda", generator=generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=dtype):
            loss = nn.functional.cross_entropy(net(x).float(), torch.arange(8, device="cuda"))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        commit_running_stats(model)
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("norm", ["en", "sn", "bn", "gn"])
def test_no_step_waits_for_the_device(norm: str) -> None:
    ops.set_backend("triton")
    model = small_model(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        commit_running_stats(model)
        return loss

    step()
    step()
    with waiting_is_an_error():
        losses = [step() for _ in range(20)]
    assert bool(torch.stack(losses).isfinite().all())


@pytest.mark.parametrize("norm", ["en", "sn", "bn", "gn"])
def test_triton_learns_as_the_eager_formulas_do(norm: str) -> None:
    ops.set_backend("eager")
    model = small_model(norm)
    eager = steps(model, model, 6)
    ops.set_backend("triton")
    model = small_model(norm)
    assert steps(model, model, 6) == pytest.approx(eager, rel=3e-2)


def test_half_precision_with_a_scaler() -> None:
    ops.set_backend("triton")
    model = small_model("en")
    losses = steps(model, model, 8, dtype=torch.float16)
    assert all(loss == loss and loss < 100 for loss in losses)


def test_the_whole_model_compiled_learns_alike() -> None:
    ops.set_backend("triton")
    model = small_model("en")
    expected = steps(model, model, 4)
    model = small_model("en")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's compiler warns of
        found = steps(model, torch.compile(model, fullgraph=True), 4)
    assert found == pytest.approx(expected, rel=3e-2)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    ops.set_backend("triton")
    layer = norm_class("en")(64, act="relu").cuda()
    configure_scope(layer)
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    grads = []
    for checkpointed in (False, True):
        value = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, value, use_reentrant=False) if checkpointed else layer(value)
        y.sum().backward()
        grads.append(value.grad)
    assert torch.equal(*grads)


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    ops.set_backend("triton")
    layer = norm_class("bn")(64, act="relu").cuda()
    x = torch.empty(2**31 // (64 * 2**20) + 2, 1024, 1024, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x.normal_().requires_grad_()
    y = layer(x)
    y.backward(x.detach())
    tail, expected = y[-1], torch.nn.functional.batch_norm(x[-1:].detach().float(), None, None, training=True).relu()[0]
    assert error(tail, expected) < 2e-2
    assert x.grad is not None
    assert bool(x.grad[-1].isfinite().all())


def test_trainings_resume_and_repeat(tmp_path: Path) -> None:
    data = make_image_folder(tmp_path / "data")
    arguments = tiny(data, "norm=en", "ops.backend=auto", "trainer.deterministic=true", "trainer.precision=bf16")
    first, second = (train(arguments, tmp_path / name) for name in "ab")
    weights = [torch.load(next(run.glob("checkpoints/*.pt")), weights_only=True)["model"] for run in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cuda_graph_trains_as_single_launches_do(precision: str, tmp_path: Path) -> None:
    data = make_image_folder(tmp_path / "data")
    options = ("norm=en", "ops.backend=auto", "trainer.deterministic=true", f"trainer.precision={precision}")
    runs = [
        train(tiny(data, *options, "trainer.passes=2", "batch=4x4", f"trainer.cuda_graph={graph}"), tmp_path / graph)
        for graph in ("false", "true")
    ]
    assert metrics(runs[0]) == metrics(runs[1])


def test_one_process_over_nccl() -> None:
    code = (
        "import os, torch, torch.distributed as dist\n"
        "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29511', RANK='0', WORLD_SIZE='1')\n"
        "dist.init_process_group('nccl')\n"
        "from exnorm import ops\n"
        "from exnorm.surgery import norm_class\n"
        "from exnorm.norms import configure_scope, commit_running_stats\n"
        "ops.set_backend('triton')\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), norm_class('en')(64, act='relu')).cuda()\n"
        "configure_scope(model, group=dist.group.WORLD)\n"
        "net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)\n"
        "net(torch.randn(4, 3, 16, 16, device='cuda')).square().mean().backward()\n"
        "commit_running_stats(model)\n"
        "assert all(p.grad.isfinite().all() for p in model.parameters())\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
