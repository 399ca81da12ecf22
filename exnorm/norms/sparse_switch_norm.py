"""Sparse Switchable Normalization (SSN).

W. Shao, T. Meng, J. Li, R. Zhang, Y. Li, X. Wang, P. Luo, "SSN: Learning Sparse Switchable Normalization via
SparsestMax", CVPR 2019. Official code: github switchablenorms/Sparse_SwitchNorm.

SN with sparsestmax for softmax: ratios that are pushed away from the middle of the simplex by a circle whose radius r
grows from 0 to 1 over training, so that each layer ends with one normalizer for the means and one for the variances.

    w = sparsemax(z),  u = uniform on the support of w
    p = w where |w - u| >= r, else u + r (w - u) / |w - u|; where that leaves the simplex, on the face next to it, with
    the radius that the circle has there

Differences from the official code: the ratios are computed without asking the GPU for a value, inputs of 2 to 5
dimensions, no whole tensors of normalized values. As there, the ratio parameters have a tenth of the learning rate and
no weight decay. Where all logits are equal there is no direction to move in, and the ratios stay equal.
"""

from typing import Any

import torch
from torch import Tensor

from exnorm.norms.statistics import Moments
from exnorm.norms.switch_norm import SwitchNorm

NOWHERE = 1e-12  # a squared distance that may be rounding


class SparseSwitchNorm(SwitchNorm):
    """y = weight * (x - sum_k p_k mu_k) / sqrt(sum_k p'_k var_k + eps) + bias with p, p' from sparsestmax.

    Parameters and arguments: see `SwitchNorm`. Buffer: progress, the radius, set by `set_progress`.
    """

    progress: Tensor

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.register_buffer("progress", torch.zeros((), device=options.get("device")))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The ratio parameters learn slowly and do not decay."""
        return {name: {"lr_scale": 0.1, "weight_decay": 0.0} for name in ("mean_weight", "var_weight")}

    def ratios(self, moments: Moments) -> dict[str, Tensor]:
        """The weights of the means and of the variances, (K,) each, in the order of `normalizers`."""
        dtype = moments.mean_NC.dtype
        radius = self.progress.to(dtype)
        return {
            "mean": sparsestmax(self.mean_weight.to(dtype), radius),
            "var": sparsestmax(self.var_weight.to(dtype), radius),
        }


def sparsestmax(logit_K: Tensor, radius: Tensor) -> Tensor:
    """Ratios (K,) on the simplex, no nearer to the middle of their support than `radius`, for K up to 3."""
    ratio_K = _sparsemax(logit_K)
    middle_K = _middle(ratio_K)
    for _ in range(len(logit_K) - 1):  # each turn may leave one face of the simplex for a smaller one
        away_K = ratio_K - middle_K
        squared = away_K.square().sum()
        apart = (squared.detach() > NOWHERE).to(squared.dtype)
        moves = apart * (squared.detach() < radius.square()).to(squared.dtype)
        pushed_K = middle_K + radius * away_K * torch.rsqrt(squared + (1 - apart))
        ratio_K = _sparsemax(ratio_K + moves * (pushed_K - ratio_K))
        next_middle_K = _middle(ratio_K)
        radius = torch.sqrt((radius.square() - (middle_K - next_middle_K).square().sum()).relu())
        middle_K = next_middle_K
    return ratio_K


def _sparsemax(logit_K: Tensor) -> Tensor:
    """The nearest point of the simplex: max(z - t, 0), where t = max_k (sum of the k largest - 1) / k."""
    total, count = logit_K.sum(), len(logit_K)
    largest = {1: logit_K.amax(), count - 1: total - logit_K.amin(), count: total}
    sums = [(largest[k] - 1) / k for k in range(1, count + 1)]
    return (logit_K - torch.stack(sums).amax()).relu()


def _middle(ratio_K: Tensor) -> Tensor:
    """Equal ratios for all that are not zero."""
    support_K = (ratio_K.detach() > 0).to(ratio_K.dtype)
    return support_K / support_K.sum()
