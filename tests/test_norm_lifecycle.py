"""What a layer does when it is made, reset, changed, transformed, traced or fed with nothing: as torch's layers do."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from norm_cases import BATCH_NORMS, NORMS, SHAPES, SMALL, build
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim

from exnorm import ops
from exnorm.norms import BatchNorm, BatchScopeNorm, GroupNorm, set_progress
from exnorm.ops import ACTIVATIONS
from exnorm.surgery import norm_class
from exnorm.testing.layers import assert_same, draw, results, state

torch.set_num_threads(1)
every_norm = pytest.mark.parametrize("name", NORMS)
every_batch_norm = pytest.mark.parametrize("name", BATCH_NORMS)
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    """The back end is what it was afterwards."""
    before = ops.get_backend()
    yield
    ops.set_backend(before)


@every_norm
def test_initialisation_can_be_skipped(name: str) -> None:
    """`nn.utils.skip_init` wants a `device` in the constructor's signature."""
    assert nn.utils.skip_init(norm_class(name), 6, **SMALL.get(name, {})).num_features == 6


@every_batch_norm
def test_the_default_dtype_is_that_of_all_values(name: str) -> None:
    """As of `nn.BatchNorm2d`: in float64 the running statistics are in float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        norm = norm_class(name)(6, **SMALL.get(name, {}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in state(norm).values() if t.is_floating_point()} == {torch.float64}


@every_batch_norm
@pytest.mark.parametrize("backend", ["eager", "plain"])
def test_tracking_that_is_switched_off_keeps_the_statistics(name: str, backend: str) -> None:
    """Training normalizes by the batch and moves nothing; evaluation uses what there is, as torch's layer does."""
    ops.set_backend(backend)
    norm, stock, x = build(name), nn.BatchNorm2d(6, dtype=torch.float64), draw(*SHAPES[4])
    assert isinstance(norm, BatchScopeNorm)
    before = state(norm)
    for layer in (norm, stock):
        layer.track_running_stats = False
        layer.train()(x)
    assert_same(state(norm), before, rtol=0, atol=0)
    assert stock.num_batches_tracked == 0
    if name == "bn":
        stock.load_state_dict(norm.state_dict())
        torch.testing.assert_close(norm.eval()(x), stock.eval()(x))


@pytest.mark.parametrize("backend", ["eager", "plain"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_may_follow_a_residual(act: str, backend: str) -> None:
    """Output and gradients are those of the norm, the sum and torch's activation, whatever the back end."""
    ops.set_backend(backend)
    norm = GroupNorm(6, num_groups=3, act=act, dtype=torch.float64)
    bare = GroupNorm(6, num_groups=3, dtype=torch.float64)
    x, residual, grad = (3 * draw(*SHAPES[4], seed=seed) for seed in range(3))
    results = []
    for layer, behind in ((norm, nn.Identity()), (bare, ACTIVATIONS[act].module())):
        inputs = [t.clone().requires_grad_() for t in (x, residual)]
        y = behind(layer(*inputs) if layer is norm else layer(inputs[0]) + inputs[1])
        y.backward(grad)
        leaves = {"x": inputs[0], "residual": inputs[1], **dict(layer.named_parameters())}
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}})
    assert_same(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_one_value_per_channel_is_refused_with_what_the_layer_has() -> None:
    """BN is not told to use an option of mixtures."""
    with pytest.raises(ValueError, match="use a larger batch or image, or sync=True with several processes$"):
        BatchNorm(6)(torch.zeros(1, 6, 1, 1))
    with pytest.raises(ValueError, match=r"or normalizers=\[in,ln\]"):
        norm_class("sn")(6)(torch.zeros(1, 6, 1, 1))


def assert_transforms_agree(norm: nn.Module, x: Tensor) -> None:
    """What torch's transforms make of a layer is what ordinary means make of it."""
    tangent: Any = torch.func.jvp(norm, (x,), (x.cos(),))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x.cos()))).tangent
    assert dual is not None
    torch.testing.assert_close(dual, tangent)
    several = torch.stack((x, 2 * x))
    leaf, values = x.clone().requires_grad_(), dict(norm.named_parameters())
    derived = torch.func.grad(lambda given: torch.func.functional_call(norm, given, (x,)).sum())(values)
    ordinary = torch.autograd.grad(norm(leaf).sum(), [leaf, *values.values()], allow_unused=True)
    # (f(x + h d) - f(x - h d)) / 2 h
    step = 1e-6 * x.cos()
    pairs = {
        "jvp": (tangent, (norm(x + step) - norm(x - step)) / 2e-6),
        "vmap": (torch.func.vmap(norm)(several), torch.stack([norm(part) for part in several])),
        "grad": (torch.func.grad(lambda x: norm(x).sum())(x), ordinary[0]),
    }
    for name, value in zip(values, ordinary[1:], strict=True):
        pairs[name] = (derived[name], torch.zeros_like(values[name]) if value is None else value)
    for name, (got, want) in pairs.items():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@every_norm
@deprecated
def test_torchs_transforms_go_through_a_layer(name: str) -> None:
    """`torch.func.grad`, `jvp`, `vmap` and forward mode, in evaluation, as stock batch normalization."""
    norm = build(name, act="silu").eval()
    set_progress(norm, 0.5)
    assert_transforms_agree(norm, draw(*SHAPES[4]))


@every_norm
@deprecated
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_layer_is_saved_and_serves_other_sizes(name: str, training: bool) -> None:
    """`torch.jit.trace` records plain operations, in which no size is fixed."""
    norm = build(name, act="relu").train(training)
    traced, file = torch.jit.trace(norm, draw(*SHAPES[4]), check_trace=False), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "PythonOp" not in str(loaded.inlined_graph)
    if not training:
        x = draw(3, 6, 4, 4, seed=3)
        torch.testing.assert_close(loaded(x), norm(x))


@every_norm
@deprecated
def test_the_old_onnx_exporter_writes_nothing_that_onnx_does_not_know(name: str) -> None:
    """Only operations of ONNX itself, no Python function that no runtime has; or the exporter's own error."""
    from torch.onnx._internal.torchscript_exporter import utils  # what `torch.onnx.export(dynamo=False)` runs

    norm = build(name, act="relu", dtype=torch.float32).eval()
    if name in ("en", "gn"):
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="aten::unflatten"):
            utils._model_to_graph(norm, (draw(*SHAPES[4]).float(),))
        return
    graph, *_ = utils._model_to_graph(norm, (draw(*SHAPES[4]).float(),))
    kinds = {node.kind() for node in graph.nodes()}
    assert kinds and all(kind.startswith("onnx::") for kind in kinds)


@every_norm
def test_an_exported_program_has_no_operator_of_exnorm(name: str) -> None:
    """On the back end that compiles, too: a saved program runs on other machines, where there is no exnorm."""
    ops.set_backend("compiled")
    norm, x = build(name, act="relu").eval(), draw(*SHAPES[4])
    program = torch.export.export(norm, (x, x.cos()), dynamic_shapes=({0: Dim("batch")}, {0: Dim("batch")}))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [target for target in targets if target.startswith("exnorm")]
    ops.set_backend("eager")
    few = draw(3, *x.shape[1:], seed=3)
    torch.testing.assert_close(program.module()(few, few.cos()), norm(few, few.cos()))


@every_norm
def test_second_derivatives_are_right_on_the_plain_back_end(name: str) -> None:
    """Checked against finite differences; the other back ends say what to do."""
    norm = build(name, act="silu").eval()
    x = draw(2, 6, 2, 2).requires_grad_()
    ops.set_backend("plain")
    assert torch.autograd.gradgradcheck(norm, (x,))
    ops.set_backend("eager")
    (first,) = torch.autograd.grad(norm(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*set_backend\('plain'\)"):
        first.sum().backward()


@every_norm
def test_the_plain_back_end_equals_the_eager_one(name: str) -> None:
    """Output, gradients and buffers in training, with a residual."""
    found = []
    for backend in ("eager", "plain"):
        ops.set_backend(backend)
        norm, x = build(name, act="relu"), draw(*SHAPES[4]).requires_grad_()
        y = norm(x, x.cos())
        found.append(results(y, x, norm, draw(*SHAPES[4], seed=4)))
    assert_same(found[1], found[0], rtol=1e-9, atol=1e-10)
