"""Compiled code is shared only by layers for which it is right: whatever their class, options, channels and dtype."""

import contextlib
import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_cases import NORMS
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune

from exnorm import ops
from exnorm.norms import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Moments,
    Norm,
    SwitchNorm,
)
from exnorm.norms.compiled import coefficients as coefficient_code
from exnorm.norms.compiled import layer as compiled_layer
from exnorm.norms.compiled.key import MOST_OPTIONS
from exnorm.ops import aot, guardless, native
from exnorm.surgery import norm_class
from exnorm.testing.layers import assert_same, draw, randomize, results, state

torch.set_num_threads(1)


class Heir(BatchNorm):
    """A class of somebody else's that adds nothing."""


class Gained(LayerNorm):
    """One with a parameter and a buffer of its own."""

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        factory = {"dtype": options.get("dtype")}
        self.gain = nn.Parameter(torch.ones(num_features, **factory))
        self.register_buffer("temperature", torch.ones((), **factory))

    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().channel_shapes(), "gain": (self.num_features,)}

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale_NC, shift_NC = super().coefficients(moments)
        assert isinstance(self.temperature, Tensor)
        return scale_NC * self.gain * self.temperature, shift_NC


class OneRow(InstanceNorm):
    """One whose scale is the same for all samples, and is not expanded to them."""

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return torch.full_like(moments.mean_NC[:1], 2.0), super().coefficients(moments)[1]


@pytest.fixture(autouse=True)
def back_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is compiled yet, in this process or on disk; the back end is what it was afterwards."""
    before = ops.get_backend()
    ops.set_backend("compiled")
    native.runs(torch.zeros(1), None)  # from the cache of the machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_layer, "_codes", {})
    monkeypatch.setattr(coefficient_code, "_codes", {})
    yield
    ops.set_backend(before)


class Checked:
    """A graph in the place of a library, which refuses inputs of which a library would make garbage."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        values = {s.node.expr: size for s, size in zip(self.inputs[0].shape, tensors[0].shape, strict=True)}
        for given, assumed in zip(tensors[1:], self.inputs[1:], strict=True):
            expressions: list[Any] = [s.node.expr if isinstance(s, torch.SymInt) else None for s in assumed.shape]
            shape = [s if e is None else int(e.subs(values)) for s, e in zip(assumed.shape, expressions, strict=True)]
            assert (list(given.shape), given.dtype) == (shape, assumed.dtype) and given.is_contiguous()
        return self.graph(*tensors)


@pytest.fixture
def graphs_for_libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Checked]:
    """What `build` leaves and `load` finds, by the library's path; nothing waits for a compiler."""
    made: dict[str, Checked] = {}

    def build(graph: fx.GraphModule, library: Path) -> None:
        made[str(library)] = Checked(graph)
        library.touch()

    monkeypatch.setattr(native, "compiled_meanwhile", contextlib.nullcontext)
    monkeypatch.setattr(aot, "build", build)
    monkeypatch.setattr(aot, "load", lambda library: made[str(library)])
    return made


Recipe = tuple[type[Norm], dict[str, Any], bool]


def random_recipe(rng: random.Random) -> Recipe:
    """A class with random options, and whether it trains."""
    kind = rng.choice([*NORMS, Heir, Gained])
    options: dict[str, Any] = {"affine": rng.random() < 0.6, "dtype": rng.choice([torch.float32, torch.float64])}
    if kind in ("bn", "sn", "ssn", "en", "brn"):
        options |= {"momentum": rng.choice([0.1, None]), "track_running_stats": rng.random() < 0.7}
    if kind in ("sn", "ssn", "en"):
        options |= {"normalizers": rng.choice([("in", "ln", "bn"), ("ln", "in"), ("bn",)])}
    if kind in ("sn", "gn"):
        options |= {("groups" if kind == "sn" else "num_groups"): rng.choice([1, 4])}
    return norm_class(kind), options, rng.random() < 0.7


def made_by(recipe: Recipe, channels: int, seed: int) -> Norm:
    """A layer with random values."""
    cls, options, training = recipe
    torch.manual_seed(seed)
    norm = cls(channels, **options)
    randomize(norm, seed)
    return norm.train(training)


def one_step(norm: Norm, backend: str, dtype: torch.dtype, replicas: int = 1) -> dict[str, Tensor]:
    """Output, gradients and buffers of a copy of the layer on a back end."""
    ops.set_backend(backend)
    layer = copy.deepcopy(norm)
    layer.replicas = replicas
    size = (4, norm.num_features, 3, 3)
    x = draw(*size).to(dtype).requires_grad_()
    y = layer(x)
    return results(y, x, layer, draw(*size, seed=4).to(dtype))


def assert_equal_on_both(norm: Norm, dtype: torch.dtype, replicas: int = 1) -> None:
    """A step of the layer is the same on the eager and the compiled back end."""
    eager, compiled = (one_step(norm, backend, dtype, replicas) for backend in ("eager", "compiled"))
    loose = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    assert_same(compiled, eager, rtol=loose, atol=loose)


def test_channels_and_dtypes_are_part_of_what_is_shared(graphs_for_libraries: dict[str, Checked]) -> None:
    """A layer without tensors, and a class of somebody else's, which shows nothing of its channels in its formula."""
    for channels in (64, 24, 40, 32):
        assert_equal_on_both(made_by((LayerNorm, {"affine": False}, True), channels, 0), torch.float32)
    assert len(graphs_for_libraries) == 4, "forward and backward, for multiples of 16 and of 8"
    for channels, dtype in ((32, torch.float32), (24, torch.float32), (24, torch.float64)):
        assert_equal_on_both(made_by((Heir, {"dtype": dtype}, True), channels, 0), dtype)


@pytest.mark.slow
def test_random_layers_through_one_cache_equal_the_eager_ones(graphs_for_libraries: dict[str, Checked]) -> None:
    """Class, options, channels, dtypes and replicas at random; every input is what the code was made for."""
    rng = random.Random(0)
    recipes = [random_recipe(rng) for _ in range(8)]
    for turn in range(200):
        norm = made_by(rng.choice(recipes), rng.choice((8, 16, 24, 32, 40, 48, 64)), turn)
        dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
        assert_equal_on_both(norm, dtype, rng.choice([1, 1, 1, 2]))
    assert 20 < len(graphs_for_libraries) < 200, "nothing was shared, or nothing was compiled"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_compiled_libraries_serve_only_the_layers_that_they_were_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred layers without tensors, and of a class of somebody else's, through one process and one cache."""
    rng = random.Random(0)
    for turn in range(200):
        cls, dtype, channels = rng.choice(
            [(LayerNorm, torch.float32, (24, 40)), (LayerNorm, torch.float32, (32, 48, 64))]
            + [(Heir, torch.float32, (8, 24)), (Heir, torch.float64, (8, 40))]
        )
        norm = cls(rng.choice(channels), affine=cls is Heir, dtype=dtype)
        randomize(norm, turn)
        if turn == 100:  # as another process would find it
            monkeypatch.setattr(compiled_layer, "_codes", {})
            monkeypatch.setattr(coefficient_code, "_codes", {})
        x, results = draw(4, norm.num_features, 3, 3).to(dtype), []
        for backend in ("eager", "compiled"):
            ops.set_backend(backend)
            layer = copy.deepcopy(norm)
            with torch.no_grad():
                results.append({"y": layer(x), **state(layer)})
        assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_library_for_other_tensors_is_refused(graphs_for_libraries: dict[str, Checked], tmp_path: Path) -> None:
    """What a library assumes lies beside it; a layer with other tensors runs eagerly after a warning."""
    norm = Heir(24)
    expected = one_step(norm, "eager", torch.float32)
    one_step(norm, "compiled", torch.float32)
    (facts,) = (tmp_path / "exnorm").glob("Heir-*/facts.json")
    assumed = json.loads(facts.read_text())
    assert assumed["inputs"][0] == ["weight", "torch.float32", [[0, 8]]]
    assumed["inputs"][0][2] = [[0, 4]]
    facts.write_text(json.dumps(assumed))
    compiled_layer._codes.clear()
    coefficient_code._codes.clear()
    with pytest.warns(UserWarning, match="Heir could not be compiled.*the compiled code is for layers with"):
        assert_same(one_step(norm, "compiled", torch.float32), expected, rtol=1e-3, atol=1e-3)


def test_a_scale_that_is_not_expanded_is_not_read_past_its_end(graphs_for_libraries: dict[str, Checked]) -> None:
    """The native pass takes (N, C) values of its own dtype, whatever the coefficients' shape and dtype."""
    x = draw(4, 6, 3, 3)
    assert_same(
        one_step(OneRow(6), "compiled", torch.float64),
        one_step(OneRow(6), "eager", torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )
    ops.set_backend("compiled")
    mean_NC, _, streamed = ops.moments(x)
    y = ops.affine(streamed, mean_NC, torch.full((1, 6), 2.0), torch.zeros(4, 1))
    torch.testing.assert_close(y, 2 * (x - x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("act", ["relu", "relu6", "gelu"])
def test_an_activation_behind_a_residual_has_its_own_gradient(
    act: str, graphs_for_libraries: dict[str, Checked]
) -> None:
    """Not ReLU's, where the compiled layer adds the residual."""
    results = []
    for backend in ("plain", "compiled"):
        ops.set_backend(backend)
        norm = GroupNorm(6, num_groups=3, act=act, dtype=torch.float64)
        inputs = [(9 * draw(4, 6, 3, 3, seed=seed)).requires_grad_() for seed in (0, 1)]
        y = norm(*inputs)
        y.backward(draw(4, 6, 3, 3, seed=2))
        results.append({"y": y.detach(), **{str(i): t.grad for i, t in enumerate(inputs) if t.grad is not None}})
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_a_momentum_schedule_compiles_nothing_anew(graphs_for_libraries: dict[str, Checked]) -> None:
    """Momentum is an input of the compiled code, and the running statistics follow it."""
    norms = [SwitchNorm(8, momentum=0.5) for _ in range(2)]
    made = set()
    for step in range(5):
        x = draw(4, 8, 3, 3, seed=step).float()
        for norm, backend in zip(norms, ("eager", "compiled"), strict=True):
            norm.momentum = 0.1 * (step + 1)
            ops.set_backend(backend)
            norm(x)
        assert_same(state(norms[1]), state(norms[0]), rtol=1e-5, atol=1e-6)
        made = made or set(graphs_for_libraries)
    assert made == set(graphs_for_libraries) and len(compiled_layer._codes) == 1


class Counting(InstanceNorm):
    """A layer with an attribute that changes at each forward."""

    calls = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, residual)


class Listed(InstanceNorm):
    """A layer with an option that can change unnoticed."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.factors = [1.0]

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale_NC, shift_NC = super().coefficients(moments)
        return scale_NC * self.factors[0], shift_NC


def pruned(norm: Norm) -> Norm:
    """A layer whose weight is made anew in each forward."""
    prune.l1_unstructured(norm, "weight", amount=2)
    return norm


def replica(norm: Norm) -> Norm:
    """What `nn.DataParallel` makes of a layer for each forward: its parameters are attributes."""
    made: Any = norm._replicate_for_data_parallel()
    for name, value in norm.named_parameters():
        setattr(made, name, value.clone())
    return made


def parametrized(norm: Norm) -> Norm:
    """A layer whose weight is a function of another parameter."""
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize("change", [pruned, replica, parametrized])
def test_weights_that_are_made_in_each_forward_are_not_compiled(
    change: Callable[[Norm], Norm], graphs_for_libraries: dict[str, Checked]
) -> None:
    """They run eagerly, and nothing is kept for each value."""
    warned_for = guardless._warned
    warned_for.clear()
    norm = LayerNorm(8)
    randomize(norm)
    x, results = draw(4, 8, 3, 3).float(), []
    layer = change(norm)
    for backend in ("eager", "compiled"):
        ops.set_backend(backend)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            results.append({"y": [change(norm)(x) if change is replica else layer(x) for _ in range(3)][-1].detach()})
    assert_same(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not graphs_for_libraries and not compiled_layer._codes


def test_options_that_keep_changing_end_on_the_eager_back_end(graphs_for_libraries: dict[str, Checked]) -> None:
    """A few sets of options are compiled; then a warning names the attribute."""
    ops.set_backend("compiled")
    norm, x = Counting(8), draw(4, 8, 3, 3).float()
    for _ in range(MOST_OPTIONS):
        norm(x)
    with pytest.warns(UserWarning, match="its attribute 'calls' changes while it runs; keep it in a buffer"):
        norm(x)
    kept = len(compiled_layer._codes)
    for _ in range(5):
        norm(x)
    assert len(compiled_layer._codes) == kept == MOST_OPTIONS


def test_an_option_that_can_change_unnoticed_is_not_compiled(graphs_for_libraries: dict[str, Checked]) -> None:
    """A list has no hash; the layer follows it all the same."""
    ops.set_backend("compiled")
    norm, x = Listed(8), draw(4, 8, 3, 3).float()
    with pytest.warns(UserWarning, match="its attribute 'factors' is not a number"):
        before = norm(x)
    norm.factors[0] = 3.0
    torch.testing.assert_close(norm(x), 3 * before)


def test_code_for_a_whole_process_tells_apart_what_it_assumes() -> None:
    """Strides, and indices beyond 32 bits, are part of a compiled function's key."""
    plain, huge = torch.empty(4, 6, device="meta"), torch.empty(2**20, 2**12, device="meta")
    facts = {guardless._facts(t) for t in (plain, plain.t().contiguous().t(), huge, plain.double())}
    assert len(facts) == 4 and guardless._facts(plain) == guardless._facts(torch.empty(9, 5, device="meta"))
