"""Back ends: as accurate as eager torch in every dtype and memory format, and equal trainings whichever runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint
from conftest import varied
from norm_cases import SHAPES, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from exnorm import ops
from exnorm.diagnostics.bench import saved_bytes
from exnorm.norms import (
    BatchNorm,
    InstanceNorm,
    Moments,
    Norm,
    configure_scope,
    set_progress,
)
from exnorm.norms.compiled import coefficients as coefficient_code
from exnorm.norms.compiled import graphs as coefficient_graphs
from exnorm.norms.compiled import layer as compiled_layer
from exnorm.norms.compiled.key import tensors_of
from exnorm.ops import aot, native
from exnorm.surgery import convert
from exnorm.testing.layers import assert_same, draw, gradients, randomize, results, state

torch.set_num_threads(1)

# Odd sizes, one position, the unrolled row lengths, rows and columns of several chunks.
SIZES = [(3, 5), (2, 3, 1), (3, 5, 2, 2), (2, 3, 4, 4), (3, 70, 7, 3), (2, 2, 5, 521), (2, 3, 2, 3, 5)]
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch's compiler


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    """Each test chooses the back end; afterwards it is what it was."""
    before = ops.get_backend()
    yield
    ops.set_backend(before)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streaming passes are inductor's, as on a GPU."""
    monkeypatch.setattr(native, "runs", lambda x, act: False)


def values(
    x: Tensor, grad: Tensor, channel_dim: int, act: str | None, residual: Tensor | None = None
) -> dict[str, Tensor]:
    """Moments, output and input gradients of a map whose coefficients depend on both moments, in float64."""
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    x, residual = inputs[0], inputs[-1] if residual is not None else None
    mean_NC, var_NC, streamed = ops.moments(x, channel_dim=channel_dim, act=act if residual is None else None)
    scale_NC = 1 + 0.1 * var_NC.roll(1, 1)
    shift_NC = var_NC.sin() + 0.1 * (mean_NC - mean_NC.mean(0, keepdim=True))
    y = ops.affine(streamed, mean_NC, scale_NC, shift_NC, residual=residual, channel_dim=channel_dim, act=act)
    found = dict(zip(("dx", "dresidual"), torch.autograd.grad(y, inputs, grad), strict=False))
    return {name: t.double() for name, t in {"mean": mean_NC, "var": var_NC, "y": y, **found}.items()}


def formats(x: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The same values contiguous, as a slice of something larger, channels last, and with the channels as last."""
    yield x, 1
    padded = torch.zeros(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)
    padded[..., ::2] = x
    yield padded[..., ::2], 1
    last = x.movedim(1, -1).contiguous()
    yield last.movedim(-1, 1), 1
    yield last, -1


def assert_as_accurate_as_eager(
    size: tuple[int, ...], dtype: torch.dtype, act: str | None, offset: float, *, residual: bool = False
) -> None:
    """|compiled - exact| <= 2 |eager - exact| + atol, where exact is float64 on the same rounded input.

    The mean, and what is centred on it, cannot be closer than the rounding of a number as large as the input.
    """
    x = (draw(*size) + offset * torch.arange(size[1]).reshape(-1, *(1,) * (len(size) - 2))).to(dtype)
    grad, added = draw(*size, seed=5).to(dtype), draw(*size, seed=7).to(dtype)
    eps = torch.finfo(dtype).eps
    for (value, channel_dim), (cotangent, _), (addend, _) in zip(
        formats(x), formats(grad), formats(added), strict=True
    ):
        other = (addend,) if residual else ()
        ops.set_backend("eager")
        exact = values(value.double(), cotangent.double(), channel_dim, act, *[t.double() for t in other])
        eager = values(value, cotangent, channel_dim, act, *other)
        ops.set_backend("compiled")
        for name, got in values(value, cotangent, channel_dim, act, *other).items():
            centred = name in ("mean", "y") or dtype == torch.float64  # in which eager is the exact one
            largest = max(exact[name].abs().max(), value.abs().max() if centred else 0)
            tolerance = (
                2 * (eager[name] - exact[name]).abs().max() + (16 if dtype == torch.float64 else 2) * eps * largest
            )
            assert (got - exact[name]).abs().max() <= tolerance, (name, channel_dim, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("act", [None, *[name for name in native.ACTIVATIONS if name]])
def test_native_passes_are_as_accurate_as_eager_torch(act: str | None, dtype: torch.dtype) -> None:
    """Every size, memory format and native activation; a mean up to 1,000 times the deviation."""
    for size in SIZES:
        for offset in (0.0, 1000.0) if dtype != torch.bfloat16 else (0.0,):
            assert native.runs(torch.zeros(1, dtype=dtype), act)
            assert_as_accurate_as_eager(size, dtype, act, offset)
            if act is None or (act == "relu" and not offset):  # under a rounded mean of 70,000 a ReLU may tip over
                assert_as_accurate_as_eager(size, dtype, act, offset, residual=True)


@pytest.mark.slow
@compiling
@pytest.mark.parametrize(
    ("act", "dtype"),
    varied(
        [(None, torch.float32), ("relu", torch.float16), ("gelu", torch.bfloat16), ("silu", torch.float32)],
        always=[(None, torch.float32), ("gelu", torch.bfloat16)],
    ),
)
def test_inductors_passes_are_as_accurate_as_eager_torch(
    without_native: None, act: str | None, dtype: torch.dtype
) -> None:
    """The same for what runs where the native passes do not."""
    for size in [(3, 5), (3, 7, 7, 3)]:
        assert_as_accurate_as_eager(size, dtype, act, 0.0, residual=act in (None, "relu"))


def test_native_passes_split_among_threads_give_the_same_bits() -> None:
    """Threads take whole rows, so that their number changes no digit."""
    x, grad = draw(8, 16, 24, 24).float(), draw(8, 16, 24, 24, seed=3).float()
    ops.set_backend("compiled")
    one = values(x, grad, 1, "relu")
    torch.set_num_threads(2)
    try:
        two = values(x, grad, 1, "relu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], two[name]) for name in one)


def run_layer(norm: Norm, x: Tensor, grad: Tensor, *, residual: bool = False) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step; with a residual that depends on the input too."""
    x = x.detach().requires_grad_()
    y = norm(x, x.cos() if residual else None)
    return results(y, x, norm, grad)


# Each pair compiles for half a minute: those that differ in what they read; LN is compiled in the tests below.
MODES = varied(
    [("bn", True), ("gn", True), ("brn", True), ("sn", True), ("ssn", True), ("en", True), ("en", False)],
    always=[("sn", True), ("en", True)],
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "training"), MODES)
def test_a_compiled_layer_equals_the_eager_one(name: str, training: bool) -> None:
    """Output, every gradient and the buffers; one sample, one group of channels and any others on the same code."""
    options: dict[str, Any] = {} if name in ("bn", "in", "ln") else {"act": "relu"}
    for size in [(6, 6, 6, 6), (4, 18, 3, 5), (1, 6, 6), (2, 30, 2, 3, 4)]:
        results = []
        for backend in ("eager", "compiled"):
            ops.set_backend(backend)
            norm = build(name, size[1], **options).train(training)
            set_progress(norm, 0.2)
            step = run_layer(norm, draw(*size), draw(*size, seed=4))
            second = run_layer(norm, draw(*size), draw(*size, seed=4), residual=True)
            results.append(step | {f"with residual: {what}": t for what, t in second.items()})
        assert_same(results[1], results[0], rtol=1e-6, atol=1e-8)
    code = coefficient_code.code_of(norm, draw(2, 3), gradient=True)
    assert code is not None and code.gradient is not None, "nothing was compiled"


@pytest.mark.parametrize("is_first", [True, False])
def test_tensors_without_memory_are_not_read(is_first: bool) -> None:
    """In FakeTensorMode the first layer gets a real input and the others fake ones; neither result has memory."""
    ops.set_backend("compiled")
    norm = build("ln", 6).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = draw(2, 6, 3, 3) if is_first else mode.from_tensor(draw(2, 6, 3, 3))
        y = norm(x.requires_grad_())
        y.sum().backward()
        assert isinstance(y, FakeTensor) and y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


def test_a_trace_with_real_tensors_has_every_operation() -> None:
    """`make_fx` records operations; the passes of C++ would be missing in its graph."""
    ops.set_backend("compiled")
    norm, x = build("ln", 6).eval(), draw(2, 6, 3, 3)
    traced = make_fx(norm)(x)
    assert_same({"y": traced(x + 1)}, {"y": norm(x + 1)}, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_layer_works_under_activation_checkpointing() -> None:
    """Recomputed in the backward, with the same gradients; compiled although the first call is a checkpointed one."""
    results = []
    for backend in ("eager", "compiled"):
        ops.set_backend(backend)
        norm = build("ln", eps=1e-3)  # an eps of its own: nothing is compiled yet
        x = draw(*SHAPES[4]).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)
        results.append({"y": y.detach(), **gradients(y, x, norm, draw(*SHAPES[4], seed=6))})
    assert_same(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_code_is_found_again_without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has compiled nothing yet loads what another one left."""
    ops.set_backend("compiled")
    size = SHAPES[4]
    results = [run_layer(build("ln", eps=1e-3), draw(*size), draw(*size, seed=4))]
    monkeypatch.setattr(compiled_layer, "_codes", {})
    monkeypatch.setattr(coefficient_code, "_codes", {})
    monkeypatch.setattr(coefficient_code, "trace", lambda *_: pytest.fail("traced again"))
    results.append(run_layer(build("ln", eps=1e-3), draw(*size), draw(*size, seed=4)))
    assert_same(results[1], results[0], rtol=0, atol=0)


def scaled_by(factor: float) -> type[Norm]:
    """A normalizer of the user's, with statistics that it reads and moves in the same forward."""

    class Scaled(BatchNorm):
        def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
            assert self.running_var is not None
            scale_NC, shift_NC = super().coefficients(moments)
            return scale_NC * self.running_var.clone() * factor, shift_NC

    return Scaled


def run_users_class(factor: float, backend: str, run: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `run` makes of a layer of `scaled_by(factor)`."""
    ops.set_backend(backend)
    norm = scaled_by(factor)(6, dtype=torch.float64)
    randomize(norm)
    return run(norm, draw(*SHAPES[4]), draw(*SHAPES[4], seed=4))


@pytest.mark.slow
def test_a_users_class_has_code_of_its_own() -> None:
    """The backward sees the buffers as the forward did; a class of the same name and another formula is another."""
    results = [run_users_class(2.0, backend, run_layer) for backend in ("eager", "compiled")]
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        results = [
            run_users_class(3.0, backend, lambda norm, x, _: {"y": norm(x), **state(norm)})
            for backend in ("eager", "compiled")
        ]
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_both_ways_to_compile_a_graph_agree() -> None:
    """For this process, as on a GPU, and as the graph says, buffers included; other sizes than it was traced with."""
    norm = build("en", 12, reduction=3)
    graph = coefficient_graphs.trace(norm, torch.float64, torch.device("cpu"), 2).coefficients
    moments = [torch.rand(4, 12, dtype=torch.float64) for _ in range(2)]
    results = []
    for run in (lambda tensors: graph(*tensors), aot.compile_here(graph)):
        learned, buffers = tensors_of(norm)
        tensors = [t.detach().clone() for t in (*learned.values(), *buffers.values())]
        sizes, length = torch.empty(4, 1), torch.tensor(5.0, dtype=torch.float64)
        results.append([*run([sizes, length, *moments, *tensors]), *tensors])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


class _Undeclared(InstanceNorm):
    """A normalizer with a parameter of C values that `channel_shapes` does not name."""

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.gain = nn.Parameter(torch.full((num_features,), 2.0, dtype=torch.float64))

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale_NC, shift_NC = super().coefficients(moments)
        return scale_NC * self.gain, shift_NC


def test_a_tensor_that_grows_unnamed_is_seen_and_not_compiled_for_one_size() -> None:
    """One warning; the result is the eager one for every number of channels."""
    ops.set_backend("compiled")
    narrow, wide = draw(2, 6, 3, 3), draw(2, 18, 3, 3)
    with pytest.warns(UserWarning, match="could not be compiled and runs eagerly"):
        y = _Undeclared(6, dtype=torch.float64)(narrow)
    torch.testing.assert_close(y, 2 * nn.functional.instance_norm(narrow))
    torch.testing.assert_close(_Undeclared(18, dtype=torch.float64)(wide), 2 * nn.functional.instance_norm(wide))


def test_parameters_that_are_not_contiguous_are_read_right() -> None:
    """The compiled code reads plain memory; such a layer runs eagerly."""
    results = []
    for backend in ("eager", "compiled"):
        ops.set_backend(backend)
        norm = build("en")
        norm.weight = nn.Parameter(norm.weight.detach().t().contiguous().t())
        results.append(run_layer(norm, draw(*SHAPES[4]), draw(*SHAPES[4], seed=4)))
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-8)


@compiling
def test_a_reset_of_torchs_compiler_does_no_harm(without_native: None) -> None:
    """It throws the compiled code away, and with it what was assumed of sizes."""
    ops.set_backend("compiled")
    x = draw(*SHAPES[4])
    before = ops.moments(x)[:2]
    torch.compiler.reset()
    for left, right in zip(ops.moments(x)[:2], before, strict=True):
        assert torch.equal(left, right)


@pytest.mark.slow
def test_a_compiled_layer_saves_its_input_and_nothing_else_as_large() -> None:
    """The bytes saved for backward, over deduplicated storages."""
    ops.set_backend("compiled")
    x = draw(4, 6, 32, 32).requires_grad_()
    norm, saved = build("en"), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        norm(x)
    assert saved.pop(x.untyped_storage().data_ptr()) == x.numel() * 8
    assert sum(saved.values()) < 0.1 * x.numel() * 8


class _Untraceable(InstanceNorm):
    """A normalizer that does what no compiler follows."""

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        assert self.num_features == moments.mean_NC.shape[1]
        factor = float(moments.var_NC.detach().mean().item() > 0)
        scale_NC, shift_NC = super().coefficients(moments)
        return scale_NC * factor, shift_NC


@compiling
def test_coefficients_that_do_not_compile_run_eagerly_after_one_warning() -> None:
    """The result is that of the eager back end; the second layer warns no more."""
    x, grad = draw(*SHAPES[4]), draw(*SHAPES[4], seed=2)
    norm = _Untraceable(6, dtype=torch.float64)
    randomize(norm)
    ops.set_backend("eager")
    expected = run_layer(norm, x, grad)
    ops.set_backend("compiled")
    with pytest.warns(UserWarning, match="could not be compiled and runs eagerly"):
        got = run_layer(norm, x, grad)
    assert_same(got, expected, rtol=1e-9, atol=1e-12)
    assert_same(run_layer(norm, x, grad), expected, rtol=1e-9, atol=1e-12)


class _OneBatchSize(InstanceNorm):
    """A normalizer that uses the number of samples as a number."""

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale_NC, shift_NC = super().coefficients(moments)
        return scale_NC * float(moments.mean_NC.shape[0]), shift_NC


def test_a_formula_that_holds_for_one_size_is_not_compiled_for_all() -> None:
    """The trace that would carry the example's number of samples is refused."""
    with pytest.raises(RuntimeError, match="its coefficients hold only for some sizes"):
        coefficient_graphs.trace(_OneBatchSize(6), torch.float32, torch.device("cpu"), 1)


def test_without_a_compiler_the_eager_back_end_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and a name that tells what runs."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"the compiled back end needs a compiler \(g\+\+"):
        assert ops.set_backend("compiled") == ops.get_backend() == "eager"


def test_a_library_that_does_not_build_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler's words are in the warning; nothing half-built is left in the cache."""
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(native, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="CPU kernels could not be compiled.*error"):
            assert not native.runs(torch.zeros(1), None)
        assert list((tmp_path / "exnorm").iterdir()) == []
    finally:
        native._library.cache_clear()


def losses_of(model: nn.Module, run: Callable[[Tensor], Tensor], size: tuple[int, ...], steps: int) -> Tensor:
    """The losses of a training by SGD, on random images of four classes."""
    x, labels = draw(*size), torch.arange(size[0]) % 4
    run(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(run(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bn", "en"])
def test_a_hundred_steps_have_the_same_losses_on_either_back_end(name: str) -> None:
    """A small network: the loss curves agree within rounding."""
    curves = []
    for backend in ("eager", "compiled"):
        ops.set_backend(backend)
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), build(name, act="relu"), nn.Conv2d(6, 6, 3), build(name, act="relu", seed=1)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).double()
        curves.append(losses_of(model, model, (64, 3, 8, 8), 100))
    assert curves[0][-1] < 0.5 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@compiling
def test_a_backbone_traced_as_a_whole_is_one_graph_with_the_same_losses() -> None:
    """timm's ResNet with fused activations, as `trainer.compile` takes it; the layers' back end has no part in it."""
    curves = []
    for compile_whole in (False, True):
        torch.manual_seed(0)
        model = convert(timm.create_model("test_resnet", num_classes=4), "en").double()
        assert any(isinstance(module, Norm) and module.fused_act for module in model.modules())
        ops.set_backend("compiled" if compile_whole else "eager")
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_whole else model
        curves.append(losses_of(model, run, (8, 3, 64, 64), 20))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@compiling
@pytest.mark.filterwarnings("ignore:.*autocast.*")
def test_a_whole_model_compiled_saves_no_more_than_with_torchs_layers() -> None:
    """The compiler decides what it saves; over formulas in the open it saves x - m in float32 for EN, a third more."""
    ops.set_backend("compiled")
    saved = {}
    x = torch.randn(4, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    for norm in (None, "sn", "en"):
        layers = [[nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()] for _ in range(2)]
        model = nn.Sequential(*[layer for group in layers for layer in group])
        if norm is not None:
            configure_scope(convert(model, norm))
        net = torch.compile(model.to(memory_format=torch.channels_last), backend="aot_eager_decomp_partition")

        def forward(net: Any = net) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return net(x).float().sum()

        forward()
        saved[norm] = saved_bytes(forward, exclude=[*model.parameters(), *model.buffers(), x])
    assert max(saved["sn"], saved["en"]) <= 1.02 * saved[None]
