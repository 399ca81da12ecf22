"""The average of a model's weights over the steps of a training.

    average = d * average + (1 - d) * weight,   d = min(decay, 1 - t^(-2/3)) after step t = 1, 2, ...

The rule is that of timm's `ModelEmaV3(use_warmup=True)`. That class collects the tensors of both models anew in each
step, which takes longer than a step of few images on a GPU. Here this is done once, and an update is two launches.
"""

import copy

import torch
from torch import Tensor, nn


class AveragedModel:
    """A copy of a model in evaluation mode whose parameters and buffers are averages; whole numbers are copied.

    Attributes:
        module: the copy.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval()
        pairs: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor that has two names is averaged once
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            pairs[average.data_ptr()] = average, value
        self._averaged = [pair for pair in pairs.values() if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs.values() if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the model's weights after a step, counted from 1."""
        decay = min(self.decay, 1 - step ** (-2 / 3))
        averages, values = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        if self._copied:
            averages, values = zip(*self._copied, strict=True)
            torch._foreach_copy_(averages, values)
