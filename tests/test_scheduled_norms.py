"""SSN and BRN: what changes over a training, against the papers' formulas written down naively."""

import math
from pathlib import Path

import pytest
import torch
from engine_cases import last_state, make_image_folder, tiny, train_here
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import build
from omegaconf import OmegaConf
from torch import Tensor, nn

from exnorm import convert
from exnorm.config.schema import OptimConfig
from exnorm.norms import BatchRenorm, SparseSwitchNorm, reference, set_progress
from exnorm.norms.sparse_switch_norm import sparsestmax
from exnorm.optim import build_optimizer, set_learning_rate
from exnorm.testing.layers import draw

logits = st.lists(st.floats(-3, 3), min_size=1, max_size=3).map(lambda z: torch.tensor(z, dtype=torch.float64))


def naive_sparsestmax(z: Tensor, radius: float) -> Tensor:
    """The recursion of the paper, with its case distinctions."""
    p = reference.sparsemax(z)
    u = (p > 0).double() / (p > 0).sum()
    while True:
        away = torch.linalg.vector_norm(p - u)
        if away >= radius or away < 1e-6:
            return p
        pushed = u + radius * (p - u) / away
        if (pushed >= 0).all():
            return pushed
        p = reference.sparsemax(pushed)
        smaller = (p > 0).double() / (p > 0).sum()
        radius = math.sqrt(max(0.0, radius**2 - float((u - smaller).square().sum())))
        u = smaller


@given(logits, st.floats(0, 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_sparsestmax_is_the_papers_recursion(z: Tensor, radius: float) -> None:
    got = sparsestmax(z, torch.tensor(radius, dtype=torch.float64))
    torch.testing.assert_close(got, naive_sparsestmax(z, radius), rtol=1e-6, atol=1e-6)
    assert (got >= 0).all() and math.isclose(float(got.sum()), 1, abs_tol=1e-9)


@pytest.mark.parametrize("z", [[0.1, 0.0, -0.1], [1.0, 0.99, 0.5], [0.0, 0.2], [2.0, 2.1, 2.2]])
def test_the_growing_radius_ends_with_the_largest_logit_alone(z: list[float]) -> None:
    """At 0 it is sparsemax; from one radius to the next the largest ratio never falls."""
    logit_K = torch.tensor(z, dtype=torch.float64)
    ratios = [sparsestmax(logit_K, torch.tensor(r / 20, dtype=torch.float64)) for r in range(21)]
    torch.testing.assert_close(ratios[0], reference.sparsemax(logit_K))
    largest = [float(ratio.max()) for ratio in ratios]
    assert largest == sorted(largest)
    assert ratios[-1].tolist() == pytest.approx([float(value == max(z)) for value in z])


def test_equal_logits_stay_equal_with_finite_gradients() -> None:
    """There is no direction to be pushed in; the published code divides by zero there."""
    logit_K = torch.ones(3, dtype=torch.float64, requires_grad=True)
    ratio_K = sparsestmax(logit_K, torch.tensor(0.5, dtype=torch.float64))
    ratio_K[0].backward()
    assert ratio_K.tolist() == pytest.approx([1 / 3] * 3) and logit_K.grad is not None and logit_K.grad.isfinite().all()


def test_ssns_ratios_learn_at_a_tenth_and_do_not_decay() -> None:
    """Also after the schedule has given all groups the rate of a step; all other parameters are as ever."""
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "ssn")
    optimizer = build_optimizer(model, OmegaConf.structured(OptimConfig(lr=0.4)), total_batch=8)
    set_learning_rate(optimizer, 0.2)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        own = name.endswith(("mean_weight", "var_weight"))
        assert rates[id(parameter)] == ((pytest.approx(0.02), 0.0) if own else (0.2, 1e-4)), name


def renorm(progress: float) -> BatchRenorm:
    """A layer with random parameters and statistics, at a point of the training."""
    norm = build("brn")
    assert isinstance(norm, BatchRenorm)
    set_progress(norm, progress)
    return norm


@pytest.mark.parametrize(("progress", "limits"), [(0.04, (1, 0)), (0.175, (2, 4.5)), (0.31, (3, 5)), (1.0, (3, 5))])
def test_brn_corrects_within_limits_that_grow(progress: float, limits: tuple[float, float]) -> None:
    norm, x, grad = renorm(progress), draw(4, 6, 3, 5).requires_grad_(), draw(4, 6, 3, 5, seed=3)
    assert norm.running_mean is not None and norm.running_var is not None
    running = (norm.running_mean.clone(), norm.running_var.clone())
    want = reference.batch_renorm(x, dict(norm.named_parameters()), norm.eps, running, limits)
    want_grads = torch.autograd.grad(want, [x, *norm.parameters()], grad)
    got = norm(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, [x, *norm.parameters()], grad), want_grads)
    assert not torch.equal(norm.running_mean, running[0])


def test_within_its_limits_brn_trains_with_what_inference_uses() -> None:
    """The output in training is that of the running statistics before the batch."""
    norm, x = renorm(1.0), draw(8, 6, 4, 4)
    norm.r_max = norm.d_max = 1e6
    want = build("brn").eval()(x)
    torch.testing.assert_close(norm(x), want)


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="r_max=0.5, d_max=5.0 is not possible; allowed: r_max >= 1"):
        BatchRenorm(4, r_max=0.5)


def test_without_running_statistics_brn_is_bn() -> None:
    norm = BatchRenorm(6, track_running_stats=False)
    set_progress(norm, 1.0)
    x = draw(4, 6, 3, 3, dtype=torch.float32)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(6)(x))


@pytest.mark.slow
def test_a_training_moves_the_progress_and_ends_with_sparse_ratios(tmp_path: Path) -> None:
    """On the compiled back end, whose layers read it as a buffer; a checkpoint has it."""
    root = make_image_folder(tmp_path / "data")
    run = train_here(tiny(root, "norm=ssn", "ops.backend=compiled"), tmp_path / "cwd")
    state = last_state(run)
    steps, weights = state["step"], state["model"]
    progress = [float(value) for name, value in weights.items() if name.endswith("progress")]
    assert progress and all(value == pytest.approx((steps - 1) / steps) for value in progress)
    layer = SparseSwitchNorm(1)
    set_progress(layer, progress[0])
    for name in (name for name in weights if name.endswith("mean_weight")):
        ratio_K = sparsestmax(weights[name], layer.progress)
        assert float(ratio_K.max()) > 0.8 or weights[name].unique().numel() == 1, name
