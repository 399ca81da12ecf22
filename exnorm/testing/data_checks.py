"""What goes in and comes out: shapes, layouts, dtypes, gradients, and what a layer keeps for its backward."""

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.norms import Norm
from exnorm.ops import ACTIVATIONS
from exnorm.testing.layers import POSITIONS, Check, Layer, assert_same, buffers, gradients, refusal, results, step

VALUES_KEPT = 3  # for each sample and channel, in one tensor; the input has one for each position
HALF = (torch.bfloat16, torch.float16)


def keeps_shape_and_dtype(layer: Layer) -> None:
    """The output has the input's shape and dtype, for 3 to 5 dimensions, with and without `affine`."""
    for positions in POSITIONS:
        for affine in (True, False):
            x = layer.input(4, *positions)
            y = layer.build(affine=affine)(x)
            assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{tuple(x.shape)} became {tuple(y.shape)}, {y.dtype}"
            assert not torch.equal(y, x), "the output is the input"


def puts_channels_last(layer: Layer) -> None:
    """channel_dim=-1 gives the output of channel_dim=1, with the channels behind the positions."""
    for positions in POSITIONS:
        x = layer.input(4, *positions)
        first, last = layer.build(), layer.build(channel_dim=-1)
        torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x))


def keeps_the_memory_format(layer: Layer) -> None:
    """A channels_last input gives a channels_last output and gradient, with the contiguous one's values."""
    for training in (True, False):
        norm = layer.build().train(training)
        x = layer.input(4, 3, 5).requires_grad_()
        value = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        want, got = norm(x), norm(value)
        (want_grad,) = torch.autograd.grad(want.square().sum(), x)
        (got_grad,) = torch.autograd.grad(got.square().sum(), value)
        assert got.is_contiguous(memory_format=torch.channels_last), "the output is not channels_last"
        assert got_grad.is_contiguous(memory_format=torch.channels_last), "the gradient is not channels_last"
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_grad, want_grad)


def has_the_right_gradients(layer: Layer) -> None:
    """The gradients of the input and of all parameters are those of finite differences."""
    for act, training in itertools.product((None, "relu"), (True, False)):
        norm = layer.build(act=act).train(training)
        names = [name for name, _ in norm.named_parameters()]

        def output(value: Tensor, *given: Tensor, norm: Norm = norm, names: list[str] = names) -> Tensor:
            parameters = dict(zip(names, given, strict=True))
            return torch.func.functional_call(norm, parameters, (value,))  # pyright: ignore[reportReturnType]

        x = layer.input(2, 2, 2).requires_grad_()
        torch.autograd.gradcheck(output, (x, *norm.parameters()), atol=1e-6, fast_mode=True)


def fuses_an_activation_and_a_residual(layer: Layer) -> None:
    """act(norm(x) + residual) in the layer equals torch's sum and activation behind it, gradients included."""
    x, residual, grad = (layer.input(4, 3, 5, seed=seed) for seed in range(3))
    for act in ACTIVATIONS:
        for added in (None, residual):
            whole, bare = layer.build(act=act), layer.build()
            behind = ACTIVATIONS[act].module()
            inputs = [t.clone().requires_grad_() for t in (x, x)]
            got = whole(inputs[0], added)
            want = bare(inputs[1])
            want = behind(want if added is None else want + added)
            torch.testing.assert_close(got, want)
            assert_same(
                gradients(got, inputs[0], whole, grad), gradients(want, inputs[1], bare, grad), rtol=1e-8, atol=1e-9
            )


def computes_in_float32_under_autocast(layer: Layer) -> None:
    """With inputs in half precision, output and gradients are as exact as the input's dtype allows."""
    for dtype, training in itertools.product(HALF, (True, False)):
        norm = layer.build(dtype=torch.float32).train(training)
        exact = copy.deepcopy(norm).double()
        x, grad = (layer.input(4, 3, 5, seed=seed, dtype=dtype) for seed in (0, 5))
        want = step(exact, x.double(), grad.double())
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = norm(leaf)
        got = results(y, leaf, norm, grad)
        assert got["y"].dtype == dtype, f"the output of {dtype} is {got['y'].dtype}"
        rounding = torch.finfo(dtype).eps
        for name, value in got.items():
            rtol, atol = {"y": (rounding, 1e-5), "x": (rounding, 1e-4)}.get(name, (1e-4, 1e-4))
            if name.startswith("buffer "):
                rtol, atol = 1e-5, 1e-6
            assert name in ("x", "y") or value.dtype not in HALF, f"{name} is {value.dtype}"
            assert_same({name: value.double()}, {name: want[name].double()}, rtol=rtol, atol=atol)


def is_accurate_for_large_means(layer: Layer) -> None:
    """float32 with a mean of 1,000 and a deviation of 1/2: output and gradient keep two digits."""
    norm = layer.build(dtype=torch.float32)
    exact = copy.deepcopy(norm).double()
    x = (1000 + layer.input(8, 8, 8) / 2).float()
    grad = layer.input(8, 8, 8, seed=5).float()
    got, want = step(norm, x, grad), step(exact, x.double(), grad.double())
    torch.testing.assert_close(got["y"].double(), want["y"], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(got["x"].double(), want["x"], rtol=1e-2, atol=2e-2)


def is_finite_for_constant_inputs(layer: Layer) -> None:
    """A plane of equal values has variance 0; output and gradients are finite in float32."""
    for constant in (0.0, 3.0, 1e4):
        x = torch.full((4, layer.channels, 3, 3), constant)
        for name, value in step(layer.build(dtype=torch.float32), x, torch.ones_like(x)).items():
            assert value.isfinite().all(), f"{name} for an input of {constant}"


def is_finite_for_one_position_or_refuses_it(layer: Layer) -> None:
    """One position or one sample: finite values, or a ValueError that says what to do."""
    for shape in ((4,), (4, 1, 1), (1, 3, 3), (1,), (1, 1, 1)):
        for training in (True, False):
            norm, x = layer.build(dtype=torch.float32).train(training), layer.input(*shape, dtype=torch.float32)
            said = refusal(lambda norm=norm, x=x: norm(x))
            if said is not None:
                assert re.search(r"\buse\b", said), f"the error does not say what to use instead: {said}"
                assert shape != (1, 3, 3), f"one sample of 9 positions is refused: {said}"
                continue
            for name, value in step(norm, x, torch.ones_like(x)).items():
                assert value.isfinite().all(), f"{name} for an input of shape {tuple(x.shape)}, training={training}"


def takes_empty_batches(layer: Layer) -> None:
    """No sample or no position: an output without elements, gradients of 0, and no change of the state."""
    for shape, training in itertools.product(((0, 3, 3), (2, 0, 3), (0,)), (True, False)):
        norm = layer.build(act="relu").train(training)
        before = buffers(norm)
        x = torch.zeros(shape[0], layer.channels, *shape[1:], dtype=torch.float64)
        found = step(norm, x, torch.zeros_like(x), x)
        y = found.pop("y")
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_same({name: found.pop(name) for name in before}, before, rtol=0, atol=0)
        assert all((gradient == 0).all() for gradient in found.values())


def refuses_other_shapes(layer: Layer) -> None:
    """Another number of channels or dimensions is a ValueError that names the shape."""
    channels = layer.channels
    for shape in ((channels,), (2, channels, 1, 1, 1, 1), (2, channels + 1, 3, 3), (0, channels + 1, 3, 3)):
        x = torch.zeros(shape, dtype=torch.float64)
        said = refusal(lambda x=x: layer.build()(x))
        assert said is not None, f"an input of shape {shape} is accepted"
        assert str(shape) in said, f"the error does not name {shape}: {said}"
        assert re.search(r"dimensions|channels", said), f"the error does not name what is wrong: {said}"


def gives_every_parameter_a_gradient(layer: Layer) -> None:
    """Also with an empty batch: `DistributedDataParallel` waits for the gradients of all parameters."""
    for samples, affine in itertools.product((4, 0), (True, False)):
        norm = layer.build(affine=affine)
        x = layer.input(samples, 3, 5).requires_grad_()
        norm(x).sum().backward()
        unused = [name for name, p in norm.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, f"no gradient for {', '.join(unused)} with {samples} samples"


def leaves_its_input_alone(layer: Layer) -> None:
    """The input keeps its values, also when the output is changed in place as in `x += shortcut`."""
    norm, x, grad = layer.build(act="relu"), layer.input(4, 3, 5), layer.input(4, 3, 5, seed=5)
    before, leaf = x.clone(), x.clone().requires_grad_()
    want = gradients((norm(leaf) + 1).relu(), leaf, norm, grad)
    y = norm(leaf)
    y += 1
    assert_same(gradients(y.relu_(), leaf, norm, grad), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        norm(x).add_(1)
    assert torch.equal(x, before), "the input was changed"


class _Recorder:
    """The storages that autograd keeps for the backward, without those of parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.elements: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.elements[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor


def keeps_one_activation(layer: Layer) -> None:
    """The backward needs the input, and besides it at most a few values for each sample and channel."""
    for act, training in itertools.product((None, "relu"), (True, False)):
        norm = layer.build(act=act, dtype=torch.float32).train(training)
        x = torch.randn(64, layer.channels, 8, 8, requires_grad=True)
        recorder = _Recorder(norm)
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
            y = norm(x)
        kept = recorder.elements.pop(x.untyped_storage().data_ptr(), None)
        assert kept == x.numel(), "the input is not kept, so something else must be"
        most = max(recorder.elements.values(), default=0)
        limit = VALUES_KEPT * x.shape[0] * layer.channels
        assert most <= limit, f"a tensor of {most} elements is kept beside the input, which has {x.numel()}"
        for node in _graph_nodes(y.grad_fn):
            assert not _tensors_in(getattr(node, "__dict__", {})), f"{node} keeps tensors outside save_for_backward"


def _graph_nodes(root: Any) -> Iterator[Any]:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
            yield node


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors_in(item)]


CHECKS: tuple[Check, ...] = (
    keeps_shape_and_dtype,
    puts_channels_last,
    keeps_the_memory_format,
    has_the_right_gradients,
    fuses_an_activation_and_a_residual,
    computes_in_float32_under_autocast,
    is_accurate_for_large_means,
    is_finite_for_constant_inputs,
    is_finite_for_one_position_or_refuses_it,
    takes_empty_batches,
    refuses_other_shapes,
    gives_every_parameter_a_gradient,
    leaves_its_input_alone,
    keeps_one_activation,
)
