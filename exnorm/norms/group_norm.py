"""Group Normalization (GN).

Y. Wu, K. He, "Group Normalization", ECCV 2018.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the positions and the channels of one group

GN does not depend on the batch, so it also works with one sample per device.

This layer equals `torch.nn.GroupNorm` if `num_groups` divides the number of channels C. If it does not, torch raises an
error. This layer then takes the largest divisor of C below `num_groups`, so one setting fits all layers of a backbone.
"""

import math
from typing import Any

from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.norms.base import Norm, fold, largest_divisor
from exnorm.norms.statistics import Moments, group_statistics


class GroupNorm(Norm):
    """y = weight * (x - mu_GN) / sqrt(var_GN + eps) + bias.

    Parameters: weight, bias (C,).

    Args (beyond `Norm`'s):
        num_groups: the largest number of groups; lowered to a divisor of C.

    Raises:
        ValueError: only one value per group; the output would always be `bias`.
    """

    def __init__(self, num_features: int, *, num_groups: int = 32, device: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, **options)
        self.num_groups = largest_divisor(num_features, num_groups, "GroupNorm: num_groups")

    def channel_multiple(self) -> int:
        return math.lcm(super().channel_multiple(), self.num_groups)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x[0].numel() == self.num_groups:
            raise UserError(
                f"GroupNorm needs more than 1 value per group, but {self.num_features} channels of 1 position in "
                f"{self.num_groups} groups have only 1; use fewer groups (norm.num_groups=...) or larger images"
            )

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        # In groups, (N, G, C / G): an index over all channels would need a division for each value of a statistic.
        weight, bias = (
            p.unflatten(0, (self.num_groups, -1)) if p.ndim else p for p in self.affine_parameters(moments.mean_NC)
        )
        grouped = moments._replace(mean_NC=moments.mean_NC.unflatten(1, (self.num_groups, -1)))
        scale, shift = fold(*group_statistics(moments, self.num_groups), weight, bias, self.eps, grouped)
        return scale.flatten(1), shift.flatten(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"
