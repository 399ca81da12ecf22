"""Instance Normalization (IN).

D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the positions of one sample and channel

Equals `torch.nn.InstanceNorm2d(C, affine=True)`, which has no affine map by default; here it is learned.
"""

from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.norms.base import Norm, fold
from exnorm.norms.statistics import Moments, instance_statistics


class InstanceNorm(Norm):
    """y = weight * (x - mu_IN) / sqrt(var_IN + eps) + bias.

    Parameters: weight, bias (C,). Arguments: see `Norm`.

    Raises:
        ValueError: one position per sample and channel, of which only `bias` would be left.
    """

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x[0].numel() == self.num_features:
            raise UserError(
                "InstanceNorm needs more than 1 position per sample and channel: of one value nothing is left; "
                "use larger images (data.image_size=64 or more for ResNets) or a norm with another scope (norm=sn, en)"
            )

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return fold(*instance_statistics(moments), weight_C, bias_C, self.eps, moments)
