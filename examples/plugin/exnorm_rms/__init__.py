"""RMS normalization as a normalizer of exnorm.

B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019.

    y = weight * x / sqrt(ms + eps) + bias,   ms: mean of x^2 over the channels and positions of one sample
"""

from torch import Tensor

from exnorm.norms.base import Norm
from exnorm.norms.statistics import Moments


class RmsNorm(Norm):
    """y = weight * x / sqrt(ms + eps) + bias.

    Parameters: weight, bias (C,). Arguments: see `exnorm.norms.Norm`.
    """

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        mean_square_N1 = (moments.var_NC + moments.mean_NC.square()).mean(1, keepdim=True)
        scale_NC = weight_C * (mean_square_N1 + self.eps).rsqrt()
        return scale_NC, scale_NC * moments.mean_NC + bias_C
