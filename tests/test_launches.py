"""What a training step asks of a device: no wait for a result, and few launches outside the layers.

Operators are counted on the CPU. On a GPU each is at least a launch, and one that reads a value to the host, or makes a
tensor of the host's numbers, waits for all that was launched before.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from engine_cases import classification
from norm_cases import BATCH_NORMS, NORMS, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from exnorm.norms import commit_running_stats, configure_scope
from exnorm.testing.layers import draw

WAITING = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero"}
OUTSIDE_THE_LAYERS = 30


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NORMS)
def test_no_layer_waits_for_the_device(name: str) -> None:
    norm = build(name, 6, dtype=torch.float32, act="relu")
    configure_scope(norm)
    x = draw(4, 6, 3, 3, dtype=torch.float32).requires_grad_()
    for _ in range(2):  # the first step fills caches
        with Operators() as operators:
            norm(x).sum().backward()
            commit_running_stats(norm)
    assert not WAITING & operators.counts.keys()


def test_metrics_wait_for_nothing() -> None:
    task = classification(classes=7)
    logits, labels = torch.randn(4, 7), torch.arange(4)
    with Operators() as operators:
        task.sums(logits, [labels, labels])
    assert not WAITING & operators.counts.keys()


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_a_commit_takes_no_more_launches_for_many_layers(name: str) -> None:
    """Besides views, which launch nothing."""
    launches = []
    for layers in (2, 20):
        model = nn.Sequential(*(build(name, channels) for channels in [6, 12] * (layers // 2)))
        configure_scope(model)
        for _ in range(2):
            model[0](draw(4, 6, 3, 3))
            with Operators() as operators:
                commit_running_stats(model)
        views = {"split", "view", "alias", "detach"}
        launches.append(sum(count for operator, count in operators.counts.items() if operator not in views))
    assert launches[0] == launches[1] <= OUTSIDE_THE_LAYERS
