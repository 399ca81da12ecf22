"""Batch Normalization (BN).

S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015.

    y = weight * (x - mu) / sqrt(var + eps) + bias,   mu, var over the samples and positions of one replica

BN is the usual normalizer of convolutional networks. It needs more than a few samples per replica.

This layer equals `torch.nn.BatchNorm2d` in output, gradients, buffers and state dict. As there, the running variance
is the unbiased one: the batch's variance times n / (n - 1). In addition, BN's scope can be a virtual replica or a group
of processes, and `sync` needs no other module.
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
        ValueError: only one value per channel in training.
    """

    def constant_mean(self) -> Tensor | None:
        return None if self.uses_batch_statistics() else self.running_mean

    def stored_variance(self, var_RC: Tensor, count: Any) -> Tensor:
        return var_RC * (count / (count - 1))

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return fold(*self.batch_statistics(moments), weight_C, bias_C, self.eps, moments)
