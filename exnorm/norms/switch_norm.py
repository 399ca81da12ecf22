"""Switchable Normalization (SN).

P. Luo, R. Zhang, J. Ren, Z. Peng, J. Li, "Switchable Normalization for Learning-to-Normalize Deep Representation",
TPAMI 2019 (ICLR 2019). Official code: github switchablenorms/Switchable-Normalization.

    mu = sum_k w_k mu_k,  var = sum_k w'_k var_k,  y = weight * (x - mu) / sqrt(var + eps) + bias

over the normalizers k of IN, LN and BN; w and w' are softmaxes of K scalars each. Two variants of section 3:
`groups` channel groups with ratios of their own, and `hard` ratios, 1 for the largest and 0 for the others, to finetune
with or to train from scratch with (`model.init_from`, `model.init_ratios_from`).

Differences from the official code: IN's variance is the biased one, as in the paper's formula (`unbiased=True` gives
the code's, from which LN's and BN's are built too); the running variance starts at 1, not 0; momentum is torch's (0.1
here is 0.9 there); activations are saved once instead of three times. The official state dicts load: shapes (1, C, 1,
1) and (1, C, 1), no `num_batches_tracked`.

The authors' advice: start the ratios uniformly; a small dropout after SN or before the classifier helps on ImageNet;
pretrain and finetune with comparable batch sizes; no SN after global pooling; where BN's ratio is above about 0.3,
evaluate with batch averages (`trainer.inference=batch_average`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.norms.base import fold, largest_divisor
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.mixture import (
    NORMALIZERS,
    check_normalizers,
    initial_logits,
    mixed_statistics,
)
from exnorm.norms.statistics import Moments, Statistics


class SwitchNorm(BatchScopeNorm):
    """y = weight * (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + bias.

    Parameters: weight, bias (C,); mean_weight, var_weight (K,), initialised to 1, in the order of `normalizers`;
    (G, K) with several groups.

    Args (beyond `BatchScopeNorm`'s):
        normalizers: which of in, ln, bn are mixed; without bn there are no running statistics.
        unbiased: IN's variance divides by L - 1, as in the official code.
        initial: the normalizer that has nearly all weight at first; None for equal ratios.
        groups: the largest number G of channel groups with ratios of their own; lowered to a divisor of C.
        hard: each set of ratios is 1 for its largest and 0 for the others, and is not learned.

    Raises:
        ValueError: unknown normalizers; `unbiased` with one position per sample and channel.
    """

    def __init__(
        self,
        num_features: int,
        *,
        normalizers: Sequence[str] = NORMALIZERS,
        unbiased: bool = False,
        initial: str | None = None,
        groups: int = 1,
        hard: bool = False,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.normalizers = check_normalizers("SwitchNorm", normalizers, initial)
        track = track_running_stats and "bn" in self.normalizers
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, track_running_stats=track, **factory, **options)
        self.unbiased = unbiased
        self.initial = initial
        self.groups = largest_divisor(num_features, groups, f"{type(self).__name__}: groups")
        self.hard = hard
        count = len(self.normalizers)
        shape = (count,) if self.groups == 1 else (self.groups, count)
        self.mean_weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=not hard)
        self.var_weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=not hard)
        self.reset_ratios()

    def reset_parameters(self) -> None:
        """All values as at construction, the ratios too."""
        super().reset_parameters()
        self.reset_ratios()

    @torch.no_grad()
    def reset_ratios(self) -> None:
        """Ratios as at construction."""
        logits = initial_logits(self.normalizers, self.initial, 1.0)
        self.mean_weight.copy_(logits)
        self.var_weight.copy_(logits)

    def has_batch_scope(self) -> bool:
        return "bn" in self.normalizers

    def channel_multiple(self) -> int:
        return math.lcm(super().channel_multiple(), self.groups)

    def ratios(self, moments: Moments) -> dict[str, Tensor]:
        """The weights of the means and of the variances, (K,) or (G, K) each, in the order of `normalizers`."""
        dtype = moments.mean_NC.dtype
        shares = largest_alone if self.hard else self.shares
        return {"mean": shares(self.mean_weight.to(dtype)), "var": shares(self.var_weight.to(dtype))}

    def shares(self, logits: Tensor) -> Tensor:
        """The ratios of logits, (K,) or (G, K)."""
        return torch.softmax(logits, -1)

    def fixed_mean(self) -> Tensor | None:
        mean_C = self.running_mean
        if self.training or mean_C is None:
            return None
        others = [k for k, name in enumerate(self.normalizers) if name != "bn"]
        ratios = self.ratios(Moments(mean_C[None], mean_C[None], 1)).values()
        return None if any(ratio[..., others].any() for ratio in ratios) else mean_C

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        ratios = self.ratios(moments)
        statistics = mixed_statistics(self, self.normalizers, self._with_in_variance(moments))
        weight, bias = self.affine_parameters(moments.mean_NC)
        if self.groups > 1:  # everything by groups, (N, G, C / G)
            statistics = [Statistics(*(self._grouped(value, 1) for value in pair)) for pair in statistics]
            weight, bias = (self._grouped(value, 0) for value in (weight, bias))
            moments = moments._replace(mean_NC=self._grouped(moments.mean_NC, 1))
        mean = _weighted_sum(ratios["mean"], [s.mean for s in statistics])
        var = _weighted_sum(ratios["var"], [s.var for s in statistics])
        scale, shift = fold(mean, var, weight, bias, self.eps, moments)
        return (scale.flatten(1), shift.flatten(1)) if self.groups > 1 else (scale, shift)

    def _grouped(self, value: Tensor, dim: int) -> Tensor:
        """The channels in `dim` as groups and channels of a group; what all channels share stays one value."""
        if value.ndim <= dim:
            return value
        return value.unsqueeze(-1) if value.shape[dim] == 1 else value.unflatten(dim, (self.groups, -1))

    def _with_in_variance(self, moments: Moments) -> Moments:
        if not self.unbiased:
            return moments
        return moments._replace(var_NC=moments.var_NC * (moments.length / (moments.length - 1)))

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if self.unbiased and x[0].numel() == self.num_features:
            raise UserError(
                "SwitchNorm: unbiased=True needs more than 1 position per sample and channel (the published code gives "
                "NaN there); use norm.unbiased=false or larger images"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim > 1 and value.numel() == self.num_features:
                state_dict[prefix + name] = value.reshape(self.num_features)
        if self.num_batches_tracked is not None:
            state_dict.setdefault(
                prefix + "num_batches_tracked",
                torch.zeros_like(self.num_batches_tracked),
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, normalizers={self.normalizers}"
        text += ", unbiased=True" if self.unbiased else ""
        text += f", groups={self.groups}" if self.groups > 1 else ""
        return text + (", hard=True" if self.hard else "")


def largest_alone(logits: Tensor) -> Tensor:
    """1 for the largest of the K logits in each row, 0 for the others."""
    return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)


def _weighted_sum(ratios: Tensor, statistics: Sequence[Tensor]) -> Tensor:
    """sum_k ratio_k * statistic_k, where the statistics broadcast to (N, C), or by groups to (N, G, C / G)."""
    shares = ratios.unbind(-1) if ratios.ndim == 1 else ratios.unsqueeze(1).unbind(-1)
    return functools.reduce(torch.add, [share * statistic for share, statistic in zip(shares, statistics, strict=True)])
