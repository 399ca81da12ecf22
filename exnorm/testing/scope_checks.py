"""Which samples a layer sees together. A batch setting such as 8x4 means the same on any hardware because of these."""

import torch
from torch import Tensor

from exnorm.norms import BatchScopeNorm, Norm, commit_running_stats, configure_scope
from exnorm.testing.layers import Check, Layer, assert_same, gradients, has_batch_scope, state

SAMPLES = 8


def treats_samples_alone_in_evaluation(layer: Layer) -> None:
    """In evaluation a sample's output does not depend on the other samples."""
    norm, x = layer.build().eval(), layer.input(4, 3, 5)
    if isinstance(norm, BatchScopeNorm) and norm.uses_batch_statistics():  # track_running_stats=False
        return
    other = torch.cat((x[:1], 1000 * x[1:]))
    torch.testing.assert_close(norm(other)[:1], norm(x)[:1])
    torch.testing.assert_close(norm(x[:1]), norm(x)[:1])


def treats_replicas_alone_in_training(layer: Layer) -> None:
    """A replica's output does not depend on the others; only a subclass of `BatchScopeNorm` mixes samples at all."""
    norm = layer.build()
    if _is_synchronized(norm):
        return
    replicas = 2 if has_batch_scope(norm) else SAMPLES
    configure_scope(norm, replicas=replicas)
    x = layer.input(SAMPLES, 3, 5)
    first = SAMPLES // replicas
    other = torch.cat((x[:first], 3 * x[first:]))
    torch.testing.assert_close(norm(other)[:first], norm(x)[:first])


def gives_the_same_step_in_any_number_of_passes(layer: Layer) -> None:
    """4 replicas in one pass, 2 in two and 1 in four: the same outputs, gradients and running statistics."""
    if _is_synchronized(layer.build()):  # its scope is the complete pass
        return
    results = [_step(layer, replicas=replicas, passes=4 // replicas) for replicas in (4, 2, 1)]
    for other in results[1:]:
        assert_same(other, results[0], rtol=1e-9, atol=1e-10)


def _step(layer: Layer, *, replicas: int, passes: int) -> dict[str, Tensor]:
    """Return output, gradients and, after one update of the running statistics, the buffers."""
    norm = layer.build(act="relu")
    configure_scope(norm, replicas=replicas)
    x, grad = layer.input(SAMPLES, 3, 5), layer.input(SAMPLES, 3, 5, seed=5)
    outputs, of_input = [], []
    total = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    for part, grad_part in zip(x.chunk(passes), grad.chunk(passes), strict=True):
        leaf = part.clone().requires_grad_()
        y = norm(leaf)
        found = gradients(y, leaf, norm, grad_part)
        outputs.append(y.detach())
        of_input.append(found.pop("x"))
        total = {name: total[name] + value for name, value in found.items()}
    commit_running_stats(norm)
    buffers = {f"buffer {name}": value for name, value in norm.named_buffers() if "pending" not in name}
    return {"y": torch.cat(outputs), "x": torch.cat(of_input), **total, **buffers}


def moves_running_statistics_once_per_step(layer: Layer) -> None:
    """In the engine a forward changes no running statistics, and `commit_running_stats` changes them once."""
    norm = layer.build()
    if not _has_running_statistics(norm):
        return
    configure_scope(norm, replicas=2)
    before = state(norm)
    assert not [name for name in before if "pending" in name], "pending sums are in the state dict"
    norm(layer.input(SAMPLES, 3, 5))
    assert_same(state(norm), before, rtol=0, atol=0)
    commit_running_stats(norm)
    once = state(norm)
    assert not torch.equal(once["running_mean"], before["running_mean"]), "the running mean did not move"
    commit_running_stats(norm)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(state(norm)[name], once[name])


def has_running_statistics_that_evaluation_uses(layer: Layer) -> None:
    """After many steps on one batch, evaluation gives nearly the output of training."""
    norm = layer.build()
    if not isinstance(norm, BatchScopeNorm) or not _has_running_statistics(norm) or not has_batch_scope(norm):
        return
    norm.momentum = 0.1
    x = layer.input(SAMPLES, 9, 9)
    for _ in range(300):
        norm(x)
    torch.testing.assert_close(norm.eval()(x), norm.train()(x), rtol=0.01, atol=0.01)


def ignores_the_order_of_samples_and_positions(layer: Layer) -> None:
    """Samples of one replica and positions have no order: permuting them permutes the output."""
    order, x = torch.tensor([2, 0, 3, 1]), layer.input(4, 4)
    for training in (True, False):
        norms = [layer.build().train(training) for _ in range(3)]
        y = norms[0](x)
        torch.testing.assert_close(norms[1](x[order]), y[order])
        torch.testing.assert_close(norms[2](x[..., order]), y[..., order])


def _is_synchronized(norm: Norm) -> bool:
    return isinstance(norm, BatchScopeNorm) and norm.sync


def _has_running_statistics(norm: Norm) -> bool:
    return isinstance(norm, BatchScopeNorm) and norm.running_mean is not None


CHECKS: tuple[Check, ...] = (
    treats_samples_alone_in_evaluation,
    treats_replicas_alone_in_training,
    gives_the_same_step_in_any_number_of_passes,
    moves_running_statistics_once_per_step,
    has_running_statistics_that_evaluation_uses,
    ignores_the_order_of_samples_and_positions,
)
