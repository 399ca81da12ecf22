"""The contract of every normalizer in `conf/norm`, and what each of them promises beyond it."""

import copy
import itertools
import json
from typing import Any

import pytest
import timm
import torch
from conftest import varied
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import BATCH_NORMS, NORMS, REFUSES_ONE_POSITION, SHAPES, build, expected, layer_of, yaml_options
from torch import Tensor, nn

from exnorm.norms import (
    BatchNorm,
    BatchScopeNorm,
    ExemplarNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Norm,
    SwitchNorm,
    reference,
)
from exnorm.norms.mixture import NORMALIZERS
from exnorm.surgery import constructor_options, convert, norm_class
from exnorm.testing.compiled_checks import assert_compiles
from exnorm.testing.layers import assert_same, draw, gradients, randomize, state

torch.set_num_threads(1)

# Where a layer lies in a network, not what it computes: no option of an experiment.
STRUCTURAL = {"affine", "act", "channel_dim", "track_running_stats", "device", "dtype"}
every_norm = pytest.mark.parametrize("name", NORMS)
every_batch_norm = pytest.mark.parametrize("name", BATCH_NORMS)


@every_norm
def test_constructor_defaults_equal_the_yaml(name: str) -> None:
    """The yaml lists every option of an experiment with the constructor's default."""
    options = constructor_options(norm_class(name))
    defaults = {key: list(v) if isinstance(v, tuple) else v for key, v in options.items() if key not in STRUCTURAL}
    assert yaml_options(name) == defaults


@every_norm
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ndim", SHAPES)
def test_output_and_gradients_equal_the_naive_form(name: str, ndim: int, training: bool) -> None:
    """In float64, for 2 to 5 dimensions, both layouts, with and without the fused ReLU."""
    if ndim == 2 and name in REFUSES_ONE_POSITION:
        pytest.skip("refused; see test_one_position_is_finite_or_refused_with_advice")
    shape = SHAPES[ndim]
    for channel_dim, act in ((1, None), (1, "relu"), (-1, None), (-1, "relu")):
        norm = build(name, act=act, channel_dim=channel_dim).train(training)
        x = draw(*shape).requires_grad_()
        grad = draw(*shape, seed=5)
        want = expected(name, norm, x)
        want = want.relu() if act == "relu" else want
        want_gradients = gradients(want, x, norm, grad)
        got = norm(x if channel_dim == 1 else x.movedim(1, -1))
        got = got if channel_dim == 1 else got.movedim(-1, 1)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert_same(gradients(got, x, norm, grad), want_gradients, rtol=1e-8, atol=1e-9)


@every_batch_norm
def test_running_statistics_move_by_momentum(name: str) -> None:
    """running += momentum * (batch - running); the stored variance is n/(n-1) for BN and biased for mixtures."""
    norm = build(name, momentum=0.3)
    assert isinstance(norm, BatchScopeNorm) and norm.running_mean is not None and norm.running_var is not None
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = draw(*SHAPES[4])
    norm(x)
    channels = x.transpose(0, 1).flatten(1)
    batch_var = channels.var(1, correction=1 if isinstance(norm, BatchNorm) else 0)
    torch.testing.assert_close(norm.running_mean, 0.7 * mean + 0.3 * channels.mean(1))
    torch.testing.assert_close(norm.running_var, 0.7 * var + 0.3 * batch_var)
    before = state(norm)
    norm.eval()(x)
    assert_same(state(norm), before, rtol=0, atol=0)


@every_batch_norm
def test_looking_at_ratios_moves_no_running_statistics(name: str) -> None:
    """Reading moments and ratios in training mode is free of side effects."""
    norm = build(name)
    before = state(norm)
    moments = norm.moments(draw(*SHAPES[4]))
    if isinstance(norm, SwitchNorm | ExemplarNorm):
        norm.ratios(moments)
    norm.coefficients(moments)
    assert_same(state(norm), before, rtol=0, atol=0)


@every_norm
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1, 1), (1, 6, 3, 3), (1, 6), (1, 6, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_one_position_is_finite_or_refused_with_advice(name: str, shape: tuple[int, ...], training: bool) -> None:
    """One position, one sample: a finite output and gradient, or an error that says what to do."""
    norm = build(name, dtype=torch.float32).train(training)
    x = draw(*shape, dtype=torch.float32).requires_grad_()
    one_position, one_value = len(shape) == 2 or shape[2] == 1, shape[0] == 1
    refusable = one_position and (name in REFUSES_ONE_POSITION or (training and one_value and name in BATCH_NORMS))
    if refusable:
        with pytest.raises(ValueError, match="needs more than 1 .*use "):
            norm(x)
        return
    y = norm(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in norm.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"),
    varied(itertools.product(NORMS, (True, False)), always=[("en", True), ("sn", False)]),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor(name: str, training: bool) -> None:
    """The same with generated code."""
    assert_compiles(layer_of(name), training=training, backend="inductor")


@every_norm
@pytest.mark.parametrize(
    "options", [{"eps": -1.0}, {"act": "celu"}, {"channel_dim": 2}, {"eps": float("nan")}], ids=lambda o: next(iter(o))
)
def test_impossible_options_name_what_is_allowed(name: str, options: dict[str, Any]) -> None:
    """The option, its value and the alternatives are in the message."""
    (option,) = options
    with pytest.raises(ValueError, match=f"{option}=.*is not possible; allowed"):
        norm_class(name)(6, **options)
    with pytest.raises(ValueError, match="num_features=0 is not possible"):
        norm_class(name)(0)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BatchNorm, {"momentum": 2.0}, "momentum=2.0 is not possible"),
        (GroupNorm, {"num_groups": 0}, "num_groups=0 is not possible"),
        (SwitchNorm, {"normalizers": ()}, r"allowed: some of in, ln, bn"),
        (SwitchNorm, {"normalizers": ("in", "in")}, "each once"),
        (SwitchNorm, {"normalizers": ("in", "gn")}, "gn.*allowed"),
        (SwitchNorm, {"normalizers": ("in", "ln"), "initial": "bn"}, "initial='bn' is not among"),
        (ExemplarNorm, {"normalizers": "bn"}, "allowed: some of"),
        (ExemplarNorm, {"reduction": 0}, "reduction=0 is not possible"),
        (ExemplarNorm, {"pi": 0}, "pi=0 is not possible"),
        (ExemplarNorm, {"hidden_act": "gelu"}, "hidden_act='gelu' is not possible; allowed: tanh, relu"),
    ],
)
def test_impossible_options_of_one_norm(cls: type[Norm], options: dict[str, Any], message: str) -> None:
    """Each norm checks its own options when it is built."""
    with pytest.raises(ValueError, match=message):
        cls(8, **options)


TORCH_TWINS: list[tuple[Norm, nn.Module]] = [
    (BatchNorm(6), nn.BatchNorm2d(6)),
    (BatchNorm(6, momentum=None), nn.BatchNorm2d(6, momentum=None)),
    (BatchNorm(6, affine=False), nn.BatchNorm2d(6, affine=False)),
    (BatchNorm(6, track_running_stats=False), nn.BatchNorm2d(6, track_running_stats=False)),
    (InstanceNorm(6), nn.InstanceNorm2d(6, affine=True)),
    (LayerNorm(6), nn.GroupNorm(1, 6)),
    (GroupNorm(6, num_groups=2), nn.GroupNorm(2, 6)),
]


@pytest.mark.parametrize(("ours", "torchs"), TORCH_TWINS, ids=lambda m: repr(m) if isinstance(m, Norm) else "")
def test_equals_the_module_of_torch(ours: Norm, torchs: nn.Module) -> None:
    """Outputs, gradients, buffers and state dict over several steps and in evaluation."""
    ours, torchs = copy.deepcopy(ours).double(), copy.deepcopy(torchs).double()
    randomize(ours)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    for step in range(4):
        if step == 3:
            ours.eval()
            torchs.eval()
        x, grad = draw(*SHAPES[4], seed=step).requires_grad_(), draw(*SHAPES[4], seed=step + 9)
        got, want = ours(x), torchs(x)
        torch.testing.assert_close(got, want)
        assert_same(gradients(got, x, ours, grad), gradients(want, x, torchs, grad), rtol=1e-8, atol=1e-10)
        assert_same(state(ours), state(torchs), rtol=1e-10, atol=1e-12)


def test_group_count_is_lowered_to_a_divisor() -> None:
    """Where num_groups does not divide C: the largest divisor below it, so that one setting fits a backbone."""
    counts = {channels: GroupNorm(channels).num_groups for channels in (16, 24, 32, 40, 48, 64, 58, 97)}
    assert counts == {16: 16, 24: 24, 32: 32, 40: 20, 48: 24, 64: 32, 58: 29, 97: 1}
    norm = build("gn", 40, num_groups=32)
    x = draw(2, 40, 3, 3)
    want = nn.functional.group_norm(x, 20, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), want)


def test_group_norm_refuses_groups_of_one_value() -> None:
    """As many groups as channels, one position: only the bias would be left."""
    with pytest.raises(ValueError, match="more than 1 value per group.*num_groups"):
        GroupNorm(6, num_groups=6)(torch.zeros(2, 6))


def moments_of(norm: Norm, x: Tensor) -> dict[str, Tensor]:
    """A norm's ratios for an input."""
    assert isinstance(norm, SwitchNorm | ExemplarNorm)
    return norm.ratios(norm.moments(x))


@pytest.mark.parametrize("training", [True, False])
def test_en_ratios_are_per_sample_and_sum_to_one(training: bool) -> None:
    """(N, K), positive, equal to the naive branch, different from sample to sample, also in evaluation."""
    norm = build("en").train(training)
    assert isinstance(norm, ExemplarNorm)
    x = draw(*SHAPES[4])
    ratio_NK = moments_of(norm, x)["lambda"]
    running = (
        None
        if training or norm.running_mean is None or norm.running_var is None
        else (norm.running_mean, norm.running_var)
    )
    want = reference.exemplar_ratios(x, dict(norm.named_parameters()), norm.eps, norm.normalizers, running)
    assert ratio_NK.shape == (4, 3) and (ratio_NK > 0).all()
    torch.testing.assert_close(ratio_NK.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(ratio_NK, want)
    assert ratio_NK.std(0).min() > 1e-4


def test_sn_ratios_are_two_softmaxes() -> None:
    """(K,) each for means and variances, each summing to 1."""
    ratios = moments_of(build("sn"), draw(*SHAPES[4]))
    assert set(ratios) == {"mean", "var"}
    for value in ratios.values():
        assert value.shape == (3,) and abs(float(value.detach().sum()) - 1) < 1e-12


def test_ratios_start_equal_or_at_the_initial_normalizer() -> None:
    """1/K for every sample, or nearly 1 for `initial`."""
    x = draw(*SHAPES[4], dtype=torch.float32)
    for cls in (SwitchNorm, ExemplarNorm):
        for value in moments_of(cls(6), x).values():
            torch.testing.assert_close(value, torch.full_like(value, 1 / 3))
        for k, initial in enumerate(NORMALIZERS):
            for value in moments_of(cls(6, initial=initial), x).values():
                assert (value[..., k] > 0.9999).all()


def test_en_features_of_in_are_zero_and_those_of_ln_sum_to_zero() -> None:
    """The pooled input is IN's mean: IN's row sees only the convolution's bias; LN's row is centred."""

    def rows(norm: ExemplarNorm) -> list[torch.Tensor]:
        moments = norm.moments(draw(*SHAPES[4]))
        return [norm._features(moments, pooled_NC) for pooled_NC, _ in norm._rows(moments)]

    plain, convolved = build("en", conv=False), build("en")
    assert isinstance(plain, ExemplarNorm) and isinstance(convolved, ExemplarNorm)
    instance, layer, batch = rows(plain)
    assert torch.equal(instance, torch.zeros_like(instance))
    torch.testing.assert_close(layer.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert batch.sum(1).abs().min() > 1e-3
    bias = convolved.conv_bias
    assert bias is not None
    assert torch.equal(rows(convolved)[0], bias.expand(4, -1))


def test_en_grows_a_resnet50_by_the_papers_count() -> None:
    """K = 3, pi = 50, no bias in the convolution: 236,309 parameters over BN; with the bias, C/r per layer more."""

    def parameters(**options: Any) -> int:
        model = timm.create_model("resnet50", device="meta")
        convert(model, "en", **options)
        return sum(p.numel() for p in model.parameters())

    plain = sum(p.numel() for p in timm.create_model("resnet50", device="meta").parameters())
    assert plain == 25_557_032
    assert parameters(conv_bias=False) - plain == 236_309
    assert parameters() - plain == 236_309 + 26_560 // 16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", range(3))
def test_en_with_all_weight_on_one_normalizer_equals_it(k: int, training: bool) -> None:
    """fc2 biased to IN, LN or BN: output and gradients of the input are that normalizer's with its own affine map."""
    norm = build("en").train(training)
    assert isinstance(norm, ExemplarNorm) and norm.weight is not None and norm.bias is not None
    with torch.no_grad():
        norm.fc2_weight.zero_()
        norm.fc2_bias.copy_(torch.eye(3)[k] * 1e4)
    single = (InstanceNorm, LayerNorm, BatchNorm)[k](6, dtype=torch.float64).train(training)
    values = {"weight": norm.weight[k].detach(), "bias": norm.bias[k].detach()}
    if k == 2:
        values |= {name: value for name, value in norm.named_buffers() if name.startswith("running")}
    single.load_state_dict(values, strict=False)
    x, grad = draw(*SHAPES[4]).requires_grad_(), draw(*SHAPES[4], seed=5)
    got, want = norm(x), single(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad), torch.autograd.grad(want, x, grad))


@pytest.mark.parametrize(
    "options",
    [
        {"normalizers": ("in", "ln")},
        {"normalizers": ("bn",)},
        {"normalizers": ("bn", "in")},
        {"conv": False},
        {"conv_bias": False},
        {"hidden_act": "relu"},
        {"shared_affine": True},
    ],
    ids=str,
)
def test_en_options_equal_the_naive_form(options: dict[str, Any]) -> None:
    """Every ablation of the layer, output and gradients."""
    norm = build("en", **options)
    x, grad = draw(*SHAPES[4]).requires_grad_(), draw(*SHAPES[4], seed=5)
    got, want = norm(x), expected("en", norm, x)
    torch.testing.assert_close(got, want)
    assert_same(gradients(got, x, norm, grad), gradients(want, x, norm, grad), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sn", "en"])
def test_mixtures_without_bn_have_no_running_statistics(name: str) -> None:
    """IN and LN alone: no buffers, one sample of several positions is welcome, train equals eval."""
    norm = build(name, normalizers=["in", "ln"])
    assert not list(norm.buffers())
    x = draw(1, 6, 3, 3)
    torch.testing.assert_close(norm.train()(x), norm.eval()(x))


@pytest.mark.parametrize("name", NORMS)
def test_affine_can_be_left_out(name: str) -> None:
    """affine=False is the same as a weight of 1 and a bias of 0, without these parameters."""
    plain, full = build(name, affine=False), build(name)
    assert full.weight is not None and full.bias is not None
    with torch.no_grad():
        full.load_state_dict(plain.state_dict(), strict=False)
        full.weight.fill_(1)
        full.bias.zero_()
    assert plain.weight is None and plain.bias is None
    x = draw(*SHAPES[4])
    torch.testing.assert_close(plain(x), full(x))
    with torch.no_grad():
        full.weight.fill_(2)
    full.reset_parameters()
    assert (full.weight == 1).all()


def published_sn(x: Tensor, values: dict[str, Tensor], running: tuple[Tensor, Tensor], training: bool) -> Tensor:
    """SN with the statistics of the published code: all from IN's unbiased variance, as E[x^2] - E[x]^2."""
    samples, channels = x.shape[:2]
    flat = x.reshape(samples, channels, -1)
    mean_in, var_in = flat.mean(2, keepdim=True), flat.var(2, keepdim=True)
    square = var_in + mean_in**2
    mean_ln = mean_in.mean(1, keepdim=True)
    var_ln = square.mean(1, keepdim=True) - mean_ln**2
    mean_bn, var_bn = running
    if training:
        batch_mean = mean_in.mean(0, keepdim=True)
        batch_var = square.mean(0, keepdim=True) - batch_mean**2
        mean_bn.mul_(0.9).add_(0.1 * batch_mean.detach())
        var_bn.mul_(0.9).add_(0.1 * batch_var.detach())
        mean_bn, var_bn = batch_mean, batch_var
    w = values["mean_weight"].softmax(0)
    v = values["var_weight"].softmax(0)
    mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
    var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
    normalized = ((flat - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    return normalized * values["weight"] + values["bias"]


def test_sn_unbiased_equals_the_published_code_from_its_state_dict() -> None:
    """A state dict of the published shapes loads strictly; then outputs, gradients and buffers agree over steps."""
    torch.manual_seed(0)
    values = {name: torch.randn(1, 6, 1, 1, dtype=torch.float64) for name in ("weight", "bias")}
    values |= {name: torch.randn(3, dtype=torch.float64) for name in ("mean_weight", "var_weight")}
    running = (torch.zeros(1, 6, 1, dtype=torch.float64), torch.zeros(1, 6, 1, dtype=torch.float64))
    published = values | {"running_mean": running[0].clone(), "running_var": running[1].clone()}
    model = nn.Sequential(nn.Identity(), SwitchNorm(6, unbiased=True, dtype=torch.float64))
    model.load_state_dict({f"1.{name}": value for name, value in published.items()}, strict=True)
    norm = model[1]
    assert isinstance(norm, SwitchNorm) and norm.running_mean is not None and norm.running_var is not None
    for value in values.values():
        value.requires_grad_()
    for step in range(4):
        training = step < 3
        x, grad = draw(*SHAPES[4], seed=step).requires_grad_(), draw(*SHAPES[4], seed=9)
        got, want = model.train(training)(x), published_sn(x, values, running, training)
        torch.testing.assert_close(got, want)
        got_gradients = gradients(got, x, norm, grad)
        torch.testing.assert_close(got_gradients.pop("x"), torch.autograd.grad(want, x, grad, retain_graph=True)[0])
        for name, value in got_gradients.items():
            (want_grad,) = torch.autograd.grad(want, values[name], grad, retain_graph=True)
            torch.testing.assert_close(value, want_grad.reshape(value.shape))
        torch.testing.assert_close(norm.running_mean, running[0].flatten())
        torch.testing.assert_close(norm.running_var, running[1].flatten())


def test_sn_unbiased_with_one_position_is_refused() -> None:
    """The published code gives NaN there."""
    with pytest.raises(ValueError, match="more than 1 position.*unbiased=false"):
        SwitchNorm(6, unbiased=True)(torch.zeros(4, 6, 1, 1))


few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 1000)


@few
@given(seed=seeds, samples=st.integers(1, 4), side=st.integers(2, 5))
def test_in_ignores_an_affine_map_of_each_plane(seed: int, samples: int, side: int) -> None:
    """IN(a x + b) = IN(x) for a > 0 of every (sample, channel), with eps=0."""
    norm = build("in", eps=0)
    x = draw(samples, 6, side, side, seed=seed)
    scale = draw(samples, 6, 1, 1, seed=seed + 1).abs() + 0.1
    torch.testing.assert_close(norm(scale * x + draw(samples, 6, 1, 1, seed=seed + 2)), norm(x), rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, samples=st.integers(1, 4), positions=st.integers(1, 5))
def test_ln_ignores_an_affine_map_of_each_sample(seed: int, samples: int, positions: int) -> None:
    """LN(a x + b) = LN(x) for a > 0 of every sample, with eps=0."""
    norm = build("ln", eps=0)
    x = draw(samples, 6, positions, seed=seed)
    scale = draw(samples, 1, 1, seed=seed + 1).abs() + 0.1
    torch.testing.assert_close(norm(scale * x + draw(samples, 1, 1, seed=seed + 2)), norm(x), rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, samples=st.integers(2, 5))
def test_bn_ignores_an_affine_map_of_each_channel(seed: int, samples: int) -> None:
    """BN(a x + b) = BN(x) for a > 0 of every channel, with eps=0, in training."""
    norm = build("bn", eps=0)
    x = draw(samples, 6, 3, seed=seed)
    scale = draw(1, 6, 1, seed=seed + 1).abs() + 0.1
    torch.testing.assert_close(norm(scale * x + draw(1, 6, 1, seed=seed + 2)), norm(x), rtol=1e-6, atol=1e-6)


@few
@given(seed=seeds, order=st.permutations(range(4)))
def test_every_norm_commutes_with_a_permutation_of_samples_and_of_positions(seed: int, order: list[int]) -> None:
    """The order of samples and of positions carries no meaning, in training and in evaluation."""
    x = draw(4, 6, 4, seed=seed)
    for name in NORMS:
        for training in (True, False):
            norm = build(name, momentum=0.0).train(training) if name in BATCH_NORMS else build(name)
            torch.testing.assert_close(norm(x[order]), norm(x)[order])
            torch.testing.assert_close(norm(x[..., order]), norm(x)[..., order])


@few
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_sample_in_evaluation_does_not_depend_on_the_others(seed: int, scale: float) -> None:
    """Every norm in eval mode gives a sample alone what it gives it among others."""
    x = draw(4, 6, 3, 3, seed=seed)
    x[1:] *= scale
    for name in NORMS:
        norm = build(name).eval()
        torch.testing.assert_close(norm(x)[:1], norm(x[:1]))


@few
@given(seed=seeds, order=st.permutations(range(6)))
def test_bn_in_and_ln_treat_channels_alike(seed: int, order: list[int]) -> None:
    """Permuting channels with their parameters and buffers permutes the output."""
    x = draw(4, 6, 3, seed=seed)
    for name in ("bn", "in", "ln", "sn"):
        for training in (True, False):
            norm = build(name).train(training)
            other = copy.deepcopy(norm)
            values = {key: v[order] if v.shape == (6,) else v for key, v in norm.state_dict().items()}
            other.load_state_dict(values)
            torch.testing.assert_close(other(x[:, order]), norm(x)[:, order])


@every_norm
def test_repr_names_what_differs_from_the_default(name: str) -> None:
    """The representation is one line and shows channels, eps, activation and layout."""
    text = repr(build(name, act="relu", channel_dim=-1, affine=False))
    assert "\n" not in text and "6, eps=1e-05, affine=False, act='relu', channel_dim=-1" in text
    assert json.dumps(text)
