"""What paired verdicts rest on: runs of one seed begin with the same weights, whatever normalizer they have."""

from functools import partial

import pytest
import torch
from torch import Tensor

from exnorm.config.compose import compose_train
from exnorm.config.groups import group_options
from exnorm.models import build_network, classifier


def first_weights(model: str, norm: str, seed: int) -> dict[str, Tensor]:
    config = compose_train([f"model={model}", f"norm={norm}"])
    torch.manual_seed(seed)
    return build_network(partial(classifier, num_classes=10), config.model, config.norm).state_dict()


@pytest.mark.parametrize("model", ["resnet_mini", "shufflenet_v2_x0_5"])
def test_all_normalizers_begin_with_the_same_convolutions_and_classifier(model: str) -> None:
    """Bit-equal at one seed, different at another."""
    plain, other = first_weights(model, "bn", 3), first_weights(model, "bn", 4)
    drawn = [name for name, weight in plain.items() if weight.ndim > 1]
    assert len(drawn) > 8 and not any(torch.equal(plain[name], other[name]) for name in drawn)
    for norm in group_options("norm"):
        weights = first_weights(model, norm, 3)
        assert all(torch.equal(weights[name], plain[name]) for name in drawn), norm
