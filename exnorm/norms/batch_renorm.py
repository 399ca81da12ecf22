"""Batch Renormalization (BRN).

S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NeurIPS 2017.

    y = weight * ((x - mu_B) / sigma_B * r + d) + bias
    r = clip(sigma_B / sigma, 1 / r_max, r_max),  d = clip((mu_B - mu) / sigma, -d_max, d_max),  both without gradient

mu_B and sigma_B are the statistics of the batch. mu and sigma are the running ones, before this batch updates them. So
training uses the same statistics as inference, up to the clipping. BRN is for small batches, and for batches whose
samples are not independent.

The limits are 1 and 0 at first, which is BN, and then grow linearly to `r_max` and `d_max`. In the paper, r's limit
grows from step 5,000 to 40,000, and d's from step 5,000 to 25,000. Here these steps are fractions of the training,
where the paper's is taken as 130,000 steps (our choice). Without running statistics, the layer is BN. The running
variance is the unbiased one, as in BN.
"""

from typing import Any

import torch
from torch import Tensor

from exnorm.config.errors import UserError
from exnorm.norms.base import fold
from exnorm.norms.batch_norm import BatchNorm
from exnorm.norms.statistics import Moments

START, R_FULL, D_FULL = 0.04, 0.31, 0.19  # fractions of the training: limits grow from START to R_FULL, D_FULL


class BatchRenorm(BatchNorm):
    """y = weight * ((x - mu_B) / sigma_B * r + d) + bias, for (N, C, *spatial) with up to three spatial dimensions.

    Parameters: weight, bias (C,). Buffer: progress, the fraction of the training, set by `set_progress`.

    Args (beyond `BatchNorm`'s):
        r_max: the largest ratio of deviations, 1 or more.
        d_max: the largest difference of means, in deviations.

    Raises:
        ValueError: an option out of its range, or only one value per channel in training.
    """

    progress: Tensor

    def __init__(
        self, num_features: int, *, r_max: float = 3.0, d_max: float = 5.0, device: Any = None, **options: Any
    ) -> None:
        super().__init__(num_features, device=device, **options)
        if not r_max >= 1 or not d_max >= 0:
            raise UserError(
                f"BatchRenorm: r_max={r_max}, d_max={d_max} is not possible; allowed: r_max >= 1 and d_max >= 0"
            )
        self.r_max, self.d_max = r_max, d_max
        self.register_buffer("progress", torch.zeros((), device=device))

    def reset_parameters(self) -> None:
        """Reset all values to those at construction, also `progress`."""
        super().reset_parameters()
        self.progress.zero_()

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        if not self.training or self.running_mean is None or self.running_var is None:
            return fold(*self.batch_statistics(moments), weight_C, bias_C, self.eps, moments)
        dtype = moments.mean_NC.dtype
        # `batch_statistics` updates the running statistics in place; the correction needs the old ones.
        old_mean_C = self.running_mean.detach().clone().to(dtype)
        old_rstd_C = torch.rsqrt(self.running_var.detach().clone().to(dtype) + self.eps)
        mean, var = self.batch_statistics(moments)
        r_limit, d_limit = self._limits(dtype)
        ratio = torch.sqrt(var.detach() + self.eps) * old_rstd_C
        ratio = torch.minimum(torch.maximum(ratio, 1 / r_limit), r_limit)
        shift = (mean.detach() - old_mean_C) * old_rstd_C
        shift = torch.minimum(torch.maximum(shift, -d_limit), d_limit)
        return fold(mean, var, weight_C * ratio, bias_C + weight_C * shift, self.eps, moments)

    def _limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the limits of r and d at this point of the training."""
        progress = self.progress.detach().to(dtype)
        r_part, d_part = (((progress - START) / (full - START)).clamp(0, 1) for full in (R_FULL, D_FULL))
        return 1 + (self.r_max - 1) * r_part, self.d_max * d_part

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"
