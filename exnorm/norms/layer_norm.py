"""Layer Normalization (LN) as the papers on learning to normalize use it.

J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the channels and positions of one sample

LN does not depend on the batch. This layer equals `torch.nn.GroupNorm(1, C)`. It differs from `torch.nn.LayerNorm`,
which normalizes each token on its own.
"""

from torch import Tensor

from exnorm.norms.base import Norm, fold
from exnorm.norms.statistics import Moments, layer_statistics


class LayerNorm(Norm):
    """y = weight * (x - mu_LN) / sqrt(var_LN + eps) + bias.

    Parameters: weight, bias (C,). Arguments: see `Norm`.
    """

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return fold(*layer_statistics(moments), weight_C, bias_C, self.eps, moments)
