"""What a network costs: its learned values, and its multiply-adds for an image."""

import torch
from torch import nn

from exnorm.surgery.modes import evaluating


def count_parameters(model: nn.Module) -> int:
    """Return the number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


def gflops_per_image(model: nn.Module, image_size: int) -> float:
    """Return the multiply-adds of one forward of one image, in 1e9. Each counts as one operation, as in the papers."""
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(model), counter:
        model(image)
    return counter.get_total_flops() / 2 / 1e9
