"""Sparse Switchable Normalization (SSN).

W. Shao, T. Meng, J. Li, R. Zhang, Y. Li, X. Wang, P. Luo, "SSN: Learning Sparse Switchable Normalization via
SparsestMax", CVPR 2019. Official code: github switchablenorms/Sparse_SwitchNorm.

SSN is SN with sparsestmax in place of softmax. A circle around the middle of the simplex pushes the ratios outwards.
Its radius r grows from 0 to 1 over training. So each layer ends with one normalizer for the means and one for the
variances.

    w = sparsemax(z),  u = uniform on the support of w
    p = w if |w - u| >= r, else u + r (w - u) / |w - u|; if that leaves the simplex, the same on the nearest face, with
    the radius of the circle there

Differences from the official code: the ratios need no synchronization with the GPU, inputs have 2 to 5 dimensions, and
no tensor of normalized values is stored. As there, the ratio parameters have a tenth of the learning rate and no weight
decay. If all logits are equal, there is no direction to push them in, and the ratios stay equal.
"""

from typing import Any

import torch
from torch import Tensor

from exnorm.norms.switch_norm import SwitchNorm

NOWHERE = 1e-12  # smaller squared distances may be rounding errors


class SparseSwitchNorm(SwitchNorm):
    """y = weight * (x - sum_k p_k mu_k) / sqrt(sum_k p'_k var_k + eps) + bias with p, p' from sparsestmax.

    Parameters and arguments: see `SwitchNorm`. Buffer: progress, the radius, set by `set_progress`.
    """

    progress: Tensor

    def __init__(self, num_features: int, *, device: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, **options)
        self.register_buffer("progress", torch.zeros((), device=device))

    def reset_parameters(self) -> None:
        """Reset all values to those at construction, also `progress`."""
        super().reset_parameters()
        self.progress.zero_()

    def param_options(self) -> dict[str, dict[str, float]]:
        """The ratio parameters have a tenth of the learning rate and no weight decay."""
        return {name: {"lr_scale": 0.1, "weight_decay": 0.0} for name in ("mean_weight", "var_weight")}

    def shares(self, logits: Tensor) -> Tensor:
        """Return the ratios of logits, (K,) or (G, K)."""
        return sparsestmax(logits, self.progress.to(logits.dtype))


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """Return ratios on the simplex, at least `radius` from the middle of their support; K <= 3 logits in each row."""
    ratios = _sparsemax(logits)
    middle = _middle(ratios)
    for _ in range(_count(logits) - 1):  # each step may go from one face of the simplex to a smaller one
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
    """Return the nearest point of the simplex: max(z - t, 0), where t = max_k (sum of the k largest - 1) / k."""
    total, count = logits.sum(-1, keepdim=True), _count(logits)
    largest = {1: logits.amax(-1, keepdim=True), count - 1: total - logits.amin(-1, keepdim=True), count: total}
    sums = [(largest[k] - 1) / k for k in range(1, count + 1)]
    return (logits - torch.stack(sums).amax(0)).relu()


def _count(logits: Tensor) -> int:
    """Return K as an integer; under `torch.jit.trace` a size is a tensor."""
    return len(logits.unbind(-1))


def _middle(ratios: Tensor) -> Tensor:
    """Return equal ratios on the support, which are the ratios above zero."""
    support = (ratios.detach() > 0).to(ratios.dtype)
    return support / support.sum(-1, keepdim=True)
