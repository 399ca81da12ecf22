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

from exnorm.norms.switch_norm import SwitchNorm

NOWHERE = 1e-12  # a squared distance that may be rounding


class SparseSwitchNorm(SwitchNorm):
    """y = weight * (x - sum_k p_k mu_k) / sqrt(sum_k p'_k var_k + eps) + bias with p, p' from sparsestmax.

    Parameters and arguments: see `SwitchNorm`. Buffer: progress, the radius, set by `set_progress`.
    """

    progress: Tensor

    def __init__(self, num_features: int, *, device: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, **options)
        self.register_buffer("progress", torch.zeros((), device=device))

    def reset_parameters(self) -> None:
        """All values as at construction, `progress` too."""
        super().reset_parameters()
        self.progress.zero_()

    def param_options(self) -> dict[str, dict[str, float]]:
        """The ratio parameters learn slowly and do not decay."""
        return {name: {"lr_scale": 0.1, "weight_decay": 0.0} for name in ("mean_weight", "var_weight")}

    def shares(self, logits: Tensor) -> Tensor:
        """The ratios of logits, (K,) or (G, K)."""
        return sparsestmax(logits, self.progress.to(logits.dtype))


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """Ratios on the simplex, no nearer to the middle of their support than `radius`: in each row of K, up to 3."""
    ratios = _sparsemax(logits)
    middle = _middle(ratios)
    for _ in range(_count(logits) - 1):  # each turn may leave one face of the simplex for a smaller one
        away = ratios - middle
        squared = away.square().sum(-1, keepdim=True)
        apart = (squared.detach() > NOWHERE).to(squared.dtype)
        moves = apart * (squared.detach() < radius.square()).to(squared.dtype)
        pushed = middle + radius * away * torch.rsqrt(squared + (1 - apart))
        ratios = _sparsemax(ratios + moves * (pushed - ratios))
        next_middle = _middle(ratios)
        radius = torch.sqrt((radius.square() - (middle - next_middle).square().sum(-1, keepdim=True)).relu())
        middle = next_middle
    return ratios


def _sparsemax(logits: Tensor) -> Tensor:
    """The nearest point of the simplex: max(z - t, 0), where t = max_k (sum of the k largest - 1) / k."""
    total, count = logits.sum(-1, keepdim=True), _count(logits)
    largest = {1: logits.amax(-1, keepdim=True), count - 1: total - logits.amin(-1, keepdim=True), count: total}
    sums = [(largest[k] - 1) / k for k in range(1, count + 1)]
    return (logits - torch.stack(sums).amax(0)).relu()


def _count(logits: Tensor) -> int:
    """K; under `torch.jit.trace` a size would be a tensor."""
    return len(logits.unbind(-1))


def _middle(ratios: Tensor) -> Tensor:
    """Equal ratios for all that are not zero."""
    support = (ratios.detach() > 0).to(ratios.dtype)
    return support / support.sum(-1, keepdim=True)
