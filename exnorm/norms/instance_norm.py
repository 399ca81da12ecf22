"""Instance Normalization (IN).

D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the positions of one sample and channel

IN removes the contrast of each image. It was made for image stylization.

This layer equals `torch.nn.InstanceNorm2d(C, affine=True)`. The affine map is on by default; in torch it is off.
"""

from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.norms.base import Norm, fold
from exnorm.norms.statistics import Moments, instance_statistics


class InstanceNorm(Norm):
    """y = weight * (x - mu_IN) / sqrt(var_IN + eps) + bias.

    Parameters: weight, bias (C,). Arguments: see `Norm`.

    Raises:
        ValueError: only one position per sample and channel; the output would always be `bias`.
    """

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x[0].numel() == self.num_features:
            raise UserError(
                "InstanceNorm needs more than 1 position per sample and channel, because it maps a single value to 0; "
                "use larger images (data.image_size=64 or more for ResNets), or another norm (norm=sn or norm=en)"
            )

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return fold(*instance_statistics(moments), weight_C, bias_C, self.eps, moments)
