"""Batch Normalization (BN).

S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the samples and positions of one replica

The running variance is the unbiased one, n / (n - 1) of the batch's, as in `torch.nn.BatchNorm2d`, which this layer
equals in output, gradients, buffers and state dict. Differences from it: virtual replicas and groups as BN's scope,
and `sync` without another module.
"""

from typing import Any

from torch import Tensor

from exnorm.norms.base import fold
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.statistics import Moments


class BatchNorm(BatchScopeNorm):
    """y = weight * (x - mu_BN) / sqrt(var_BN + eps) + bias, for (N, C, *spatial) with up to three spatial dimensions.

    Parameters: weight, bias (C,). Arguments: see `BatchScopeNorm` and `Norm`.

    Raises:
        ValueError: one value per channel in training.
    """

    def constant_mean(self) -> Tensor | None:
        return None if self.uses_batch_statistics() else self.running_mean

    def stored_variance(self, var_RC: Tensor, count: Any) -> Tensor:
        return var_RC * (count / (count - 1))

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return fold(*self.batch_statistics(moments), weight_C, bias_C, self.eps, moments)
