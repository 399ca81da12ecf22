"""What a layer holds: parameters, buffers, copies, ratios, and how `exnorm.convert` makes it."""

import copy
import itertools
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exnorm.norms import Norm, commit_running_stats, configure_scope
from exnorm.surgery import convert
from exnorm.testing.layers import Check, Layer, assert_same, gradients, state


def survives_copies(layer: Layer) -> None:
    """After a forward and backward, a deep copy, a pickle and another layer with its state dict give its output."""
    norm, x = layer.build(), layer.input(4, 3, 5).requires_grad_()
    norm(x).sum().backward()
    other = layer.build(seed=9)
    other.load_state_dict(norm.state_dict(), strict=True)
    for module in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), other):
        torch.testing.assert_close(module.eval()(x), norm.eval()(x), rtol=0, atol=0)


def keeps_no_tensor_as_an_attribute(layer: Layer) -> None:
    """A forward stores no tensor on the layer: it would break copies, EMA and `torch.compile`."""
    norm = layer.build()
    norm(layer.input(4, 3, 5).requires_grad_())
    kept = [name for name, value in vars(norm).items() if isinstance(value, Tensor)]
    assert not kept, f"the layer keeps {', '.join(kept)}"


def resets_every_value(layer: Layer) -> None:
    """`reset_parameters` gives a layer that was made without values those of a new layer, buffers included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = layer.norm(layer.channels, **layer.options)
        norm = layer.norm(layer.channels, device="meta", **layer.options).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in itertools.chain(norm.parameters(), norm.buffers()):
                tensor.fill_(7)
        torch.manual_seed(0)
        norm.reset_parameters()
    assert_same(dict(norm.named_parameters()), dict(fresh.named_parameters()), rtol=0, atol=0)
    assert_same(dict(norm.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)


def has_the_dtype_and_device_that_it_is_given(layer: Layer) -> None:
    """`dtype` reaches all parameters and `device` all values; shapes can be inferred on the meta device."""
    dtypes = {parameter.dtype for parameter in layer.build(dtype=torch.float64).parameters()}
    assert dtypes <= {torch.float64}, f"dtype=float64 gives parameters of {dtypes}"
    on_meta = layer.norm(layer.channels, device="meta", **layer.options)
    assert all(tensor.is_meta for tensor in itertools.chain(on_meta.parameters(), on_meta.buffers()))
    shape = (2, layer.channels, 3, 3)
    assert on_meta(torch.empty(shape, device="meta")).shape == shape


def names_options_of_its_own_parameters(layer: Layer) -> None:
    """`param_options` has names of parameters that the layer has, with `lr_scale` and `weight_decay` alone."""
    for affine in (True, False):
        norm = layer.build(affine=affine)
        for name, options in norm.param_options().items():
            assert isinstance(getattr(norm, name, None), nn.Parameter), f"{name} is no parameter, with affine={affine}"
            others = set(options) - {"lr_scale", "weight_decay"}
            assert not others, f"{name} has the unknown options {', '.join(sorted(others))}"


def changes_nothing_in_evaluation(layer: Layer) -> None:
    """In evaluation the state stays as it is, and the same input gives the same output."""
    norm, x = layer.build().eval(), layer.input(4, 3, 5)
    before, first = state(norm), norm(x)
    assert torch.equal(norm(x), first), "two calls give different outputs"
    assert_same(state(norm), before, rtol=0, atol=0)


def has_ratios_that_sum_to_one(layer: Layer) -> None:
    """A layer with `ratios` names its `normalizers`; the shares are finite, from 0 up, and sum to 1."""
    norm, x = layer.build(), layer.input(4, 3, 5)
    ratios: Any = getattr(norm, "ratios", None)
    if ratios is None:
        return
    before, names = state(norm), list(norm.normalizers)  # pyright: ignore[reportArgumentType]
    found: dict[str, Tensor] = ratios(norm.moments(x))
    assert_same(state(norm), before, rtol=0, atol=0)  # looking at ratios moves no running statistics
    for kind, value in found.items():
        assert value.shape[-1] == len(names), f"{kind} has shape {tuple(value.shape)} for {names}"
        assert value.isfinite().all() and (value >= 0).all(), f"{kind} has shares that are negative or not finite"
        torch.testing.assert_close(value.sum(-1), torch.ones_like(value.sum(-1)))


def replaces_batch_normalization(layer: Layer) -> None:
    """`exnorm.convert` puts the class into a model, with its options, and the model trains."""
    channels = layer.channels
    model = nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
    options: dict[str, Any] = dict(layer.options)
    model = convert(model, layer.norm, **options)
    replaced = [module for module in model.modules() if isinstance(module, Norm)]
    assert len(replaced) == 1 and type(replaced[0]) is layer.norm
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    model.eval()(torch.randn(2, 3, 8, 8))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def works_under_activation_checkpointing(layer: Layer) -> None:
    """A recomputed forward gives the same output and gradients, and one update of running statistics."""
    plain, recomputed = layer.build(act="relu"), layer.build(act="relu")
    for norm in (plain, recomputed):
        configure_scope(norm)
    x, grad = layer.input(4, 3, 5).requires_grad_(), layer.input(4, 3, 5, seed=5)
    y = checkpoint(recomputed, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    found = gradients(y, x, recomputed, grad)
    assert_same(found, gradients(plain(x), x, plain, grad), rtol=1e-12, atol=1e-12)
    for norm in (plain, recomputed):
        commit_running_stats(norm)
    assert_same(state(recomputed), state(plain), rtol=1e-12, atol=1e-12)


CHECKS: tuple[Check, ...] = (
    survives_copies,
    keeps_no_tensor_as_an_attribute,
    resets_every_value,
    has_the_dtype_and_device_that_it_is_given,
    names_options_of_its_own_parameters,
    changes_nothing_in_evaluation,
    has_ratios_that_sum_to_one,
    replaces_batch_normalization,
    works_under_activation_checkpointing,
)
