"""The streaming primitives: closed forms, gradients, what they keep for backward, and memory formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exnorm import ops
from exnorm.ops import backend
from exnorm.testing.layers import draw

torch.set_num_threads(1)


def composed(x: Tensor, channel_dim: int, act: str | None, residual: Tensor | None = None) -> Tensor:
    """An affine map whose coefficients depend on both moments and mix the channels."""
    mean_NC, var_NC, streamed = ops.moments(x, channel_dim=channel_dim, act=act if residual is None else None)
    scale_NC = 1 + var_NC.roll(1, 1) * mean_NC
    shift_NC = (mean_NC * var_NC).cumsum(1).sin() + 0.1
    return ops.affine(streamed, mean_NC, scale_NC, shift_NC, residual=residual, channel_dim=channel_dim, act=act)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 3), (2, 3, 2, 1, 3)])
def test_moments_are_the_mean_and_biased_variance_over_positions(
    shape: tuple[int, ...],
) -> None:
    """Against torch.var_mean, in both layouts."""
    x = draw(*shape)
    flat = x.reshape(*shape[:2], -1)
    for value, channel_dim in ((x, 1), (x.movedim(1, -1), -1)):
        mean_NC, var_NC, _ = ops.moments(value, channel_dim=channel_dim)
        torch.testing.assert_close(mean_NC, flat.mean(2))
        torch.testing.assert_close(var_NC, flat.var(2, correction=0))


@pytest.mark.parametrize("act", [None, *ops.ACTIVATIONS])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 3)])
def test_gradient_of_moments_and_affine_together(shape: tuple[int, ...], channel_dim: int, act: str | None) -> None:
    """gradcheck in float64: the hand-written backward is the derivative of the forward."""
    x = draw(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: composed(value, channel_dim, act), (x,))


@pytest.mark.parametrize("act", [None, "relu"])
def test_gradient_of_affine_alone(act: str | None) -> None:
    """A plain tensor in place of streamed moments: gradients of the input, the centre and both coefficients."""
    x = draw(2, 3, 2, 2).requires_grad_()
    coefficients = [draw(2, 3, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(lambda *args: ops.affine(*args, act=act), (x, *coefficients))


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradient_with_a_residual(channel_dim: int, act: str | None) -> None:
    """gradcheck of input and residual, with coefficients that depend on the moments and with free ones."""
    x, residual = draw(2, 3, 2, 3).requires_grad_(), draw(2, 3, 2, 3, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: composed(args[0], channel_dim, act, args[1]), (x, residual))
    coefficients = [draw(2, 3, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    alone = lambda x, r, *args: ops.affine(x, *args, residual=r, act=act)  # noqa: E731
    assert torch.autograd.gradcheck(alone, (x, residual, *coefficients))


def test_a_residual_is_added_in_front_of_the_activation() -> None:
    """And an activation whose gradient the output does not tell is refused there."""
    x, residual = draw(2, 3, 4), draw(2, 3, 4, seed=8)
    want = (composed(x, 1, None) + residual).relu()
    torch.testing.assert_close(composed(x, 1, "relu", residual), want)
    with pytest.raises(ValueError, match="'gelu' cannot be fused behind a residual; allowed: None, relu"):
        composed(x, 1, "gelu", residual)


def test_gradient_of_moments_without_an_affine_map() -> None:
    """Reading the moments only, as a log of ratios does, still gives their gradient."""
    x = draw(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: ops.moments(value)[:2], (x,))


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays_in_output_and_input_gradient(act: str | None, dtype: torch.dtype) -> None:
    """A channels_last input gives a channels_last output and gradient with the values of a contiguous one."""
    x = draw(2, 3, 4, 5, dtype=dtype)
    grad = draw(2, 3, 4, 5, seed=7, dtype=dtype)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        value = x.clone(memory_format=memory_format).requires_grad_()
        y = composed(value, 1, act)
        y.backward(grad.contiguous(memory_format=memory_format))
        assert value.grad is not None
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        assert value.grad.is_contiguous(memory_format=memory_format)
        results.append((y, value.grad))
    torch.testing.assert_close(
        results[0],
        results[1],
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    """Equal to the moments of the same values in float64 up to float32's rounding."""
    x = draw(2, 3, 16, 16, dtype=dtype)
    mean_NC, var_NC, _ = ops.moments(x)
    assert mean_NC.dtype == var_NC.dtype == torch.float32
    torch.testing.assert_close(var_NC.double(), x.double().flatten(2).var(2, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean_NC.double(), x.double().flatten(2).mean(2), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(offset=st.sampled_from([0.0, 10.0, -1e3, 1e4]), seed=st.integers(0, 99))
def test_variance_does_not_cancel_under_a_large_mean(offset: float, seed: int) -> None:
    """The centred variance in float32 is right where E[x^2] - E[x]^2 would lose all digits."""
    x = (draw(2, 3, 8, 8, seed=seed) + offset).float()
    var_NC = ops.moments(x)[1]
    torch.testing.assert_close(var_NC.double(), x.double().flatten(2).var(2, correction=0), rtol=1e-4, atol=0)


def test_relu_passes_nan_on_and_stops_the_gradient_at_zero() -> None:
    """As torch.relu: NaN stays NaN, and where the preactivation is 0 the gradient is 0."""
    x = torch.tensor([[[-1.0, 0.0, 2.0, float("nan")]]], requires_grad=True)
    y = ops.affine(x, torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), act="relu")
    y.backward(torch.ones_like(y))
    assert y[0, 0, :3].tolist() == [0.0, 0.0, 2.0] and y[0, 0, 3].isnan()
    assert x.grad is not None and x.grad[0, 0, :3].tolist() == [0.0, 0.0, 1.0]


def test_a_second_derivative_is_refused() -> None:
    """First order only: an error, no silent zero."""
    x = draw(2, 3, 4).requires_grad_()
    (first,) = torch.autograd.grad(composed(x, 1, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*set_backend\(.plain.\)"):
        first.sum().backward()


def test_changing_the_input_before_backward_is_noticed() -> None:
    """The input is saved for backward, so that autograd's version check covers it."""
    x = draw(2, 3, 4).requires_grad_()
    inner = x * 1
    y = composed(inner, 1, None)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified .*inplace"):
        y.sum().backward()


def test_unknown_activation_and_back_end_name_what_exists() -> None:
    """Errors list the alternatives; `auto` names the back end that runs."""
    with pytest.raises(ValueError, match="unknown activation 'celu'.*relu"):
        ops.moments(draw(2, 3), act="celu")
    with pytest.raises(ValueError, match=r"unknown back end 'tpu'.*eager"):
        ops.set_backend("tpu")
    before = ops.get_backend()
    try:
        assert ops.set_backend("auto") in ops.BACKENDS
        for name in ("eager", "compiled", "plain"):
            assert ops.set_backend(name) == ops.get_backend() == name
        if not torch.cuda.is_available():
            with pytest.warns(UserWarning, match="triton back end needs an NVIDIA GPU"):
                assert ops.set_backend("triton") == "eager"
    finally:
        ops.set_backend(before)


def test_a_back_end_for_a_block_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error, and in a process that has chosen none: it still chooses by EXNORM_BACKEND then."""
    monkeypatch.setenv(backend.VARIABLE, "plain")
    with ops.using_backend("plain"):
        with ops.using_backend("eager"):
            assert ops.get_backend() == "eager"
        with pytest.raises(ZeroDivisionError), ops.using_backend("eager"):
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="unknown back end 'tpu'"), ops.using_backend("tpu"):
            pass
        assert ops.get_backend() == "plain"
        with monkeypatch.context() as nobody_has_chosen:
            nobody_has_chosen.setattr(backend, "_name", None)
            with ops.using_backend("eager"):
                pass
            assert backend._name is None and ops.get_backend() == "plain"
