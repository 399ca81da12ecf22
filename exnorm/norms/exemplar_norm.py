"""Exemplar Normalization (EN).

R. Zhang, Z. Peng, L. Wu, Z. Li, P. Luo, "Exemplar Normalization for Learning Deep Representation", CVPR 2020. No code
was released.

    y_n = sum_k lam_nk * (weight_k * (x_n - mu_k) / sqrt(var_k + eps) + bias_k),   sum_k lam_nk = 1

over the normalizers k of IN, LN and BN, each with its own affine map. The ratios are per sample, also at inference:

    x_n   : (C,)       average pooling over the positions, which is IN's mean
    xh_nk : (K, C)     (x_n - mu_k) / sqrt(var_k + eps)
    z_n   : (K, C/r)   1-D convolution C -> C/r in C/r groups, shared by the K rows
    v_n   : (K, K)     z_n z_n^T
    lam_n : (K,)       softmax(fc2 tanh(fc1 vec(v_n)))

Where SN combines the statistics with one set of ratios for all samples, EN combines the normalized maps.

Not in the paper's text at hand, and chosen here: r = 16 (where it does not divide C, the largest divisor of C that is
at most r); a bias after the convolution; `fc2` zero, so that all ratios start at 1/K; the rest as torch initialises
`nn.Linear`; eps 1e-5; momentum 0.1; the biased running variance.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.norms.base import largest_divisor
from exnorm.norms.batch_scope import BatchScopeNorm
from exnorm.norms.mixture import (
    NORMALIZERS,
    check_normalizers,
    initial_logits,
    mixed_statistics,
)
from exnorm.norms.statistics import Moments

HIDDEN_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}

# xh_nk, None where it is zero by definition (IN), and 1 / sqrt(var_k + eps)
Row = tuple[Tensor | None, Tensor]


class ExemplarNorm(BatchScopeNorm):
    """y_n = sum_k lam_nk * (weight_k * (x_n - mu_k) / sqrt(var_k + eps) + bias_k).

    Parameters: weight, bias (K, C), or (C,) with `shared_affine`; conv_weight (C/r, r), conv_bias (C/r,);
    fc1_weight (pi K, K K), fc1_bias; fc2_weight (K, pi K), fc2_bias.

    Args (beyond `BatchScopeNorm`'s):
        normalizers: which of in, ln, bn are mixed, K of them; without bn there are no running statistics.
        reduction: r, the channels that one output of the convolution reads.
        pi: the hidden layer has pi * K units.
        conv: without, the correlations are taken over all C channels.
        conv_bias: a bias after the convolution.
        hidden_act: tanh or relu.
        shared_affine: one weight and bias for all normalizers.
        initial: the normalizer that has nearly all weight at first; None for equal ratios.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        num_features: int,
        *,
        normalizers: Sequence[str] = NORMALIZERS,
        reduction: int = 16,
        pi: int = 50,
        conv: bool = True,
        conv_bias: bool = True,
        hidden_act: str = "tanh",
        shared_affine: bool = False,
        initial: str | None = None,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.normalizers = check_normalizers("ExemplarNorm", normalizers, initial)
        self.shared_affine = shared_affine
        track = track_running_stats and "bn" in self.normalizers
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, track_running_stats=track, **factory, **options)
        if hidden_act not in HIDDEN_ACTIVATIONS:
            raise UserError(
                f"ExemplarNorm: hidden_act={hidden_act!r} is not possible; allowed: {', '.join(HIDDEN_ACTIVATIONS)}"
            )
        if not isinstance(pi, int) or isinstance(pi, bool) or pi < 1:
            raise UserError(f"ExemplarNorm: pi={pi!r} is not possible; allowed: an integer from 1 up (the paper: 50)")
        self.reduction = largest_divisor(num_features, reduction, "ExemplarNorm: reduction")
        self.pi, self.hidden_act, self.initial = pi, hidden_act, initial
        count = len(self.normalizers)
        shapes = self.channel_shapes()
        self.conv_weight = nn.Parameter(torch.empty(shapes["conv_weight"], **factory)) if conv else None
        self.conv_bias = nn.Parameter(torch.empty(shapes["conv_bias"], **factory)) if conv and conv_bias else None
        self.fc1_weight = nn.Parameter(torch.empty(pi * count, count * count, **factory))
        self.fc1_bias = nn.Parameter(torch.empty(pi * count, **factory))
        self.fc2_weight = nn.Parameter(torch.empty(count, pi * count, **factory))
        self.fc2_bias = nn.Parameter(torch.empty(count, **factory))
        self.reset_ratios()

    def has_batch_scope(self) -> bool:
        return "bn" in self.normalizers

    def affine_shape(self) -> tuple[int, ...]:
        return (self.num_features,) if self.shared_affine else (len(self.normalizers), self.num_features)

    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        outputs = self.num_features // self.reduction
        own: dict[str, tuple[int, ...]] = {"conv_weight": (outputs, self.reduction), "conv_bias": (outputs,)}
        return {**super().channel_shapes(), **own}

    def channel_multiple(self) -> int:
        return math.lcm(super().channel_multiple(), self.reduction)

    def reset_parameters(self) -> None:
        """All values as at construction, up to the draw of the ratio branch."""
        super().reset_parameters()
        self.reset_ratios()

    @torch.no_grad()
    def reset_ratios(self) -> None:
        """Ratio branch as at construction: equal ratios, or nearly all weight on `initial`."""
        for weight, bias in (
            (self.conv_weight, self.conv_bias),
            (self.fc1_weight, self.fc1_bias),
        ):
            if weight is not None:
                bound = 1 / math.sqrt(weight.shape[1])
                nn.init.uniform_(weight, -bound, bound)
                if bias is not None:
                    nn.init.uniform_(bias, -bound, bound)
        nn.init.zeros_(self.fc2_weight)
        self.fc2_bias.copy_(initial_logits(self.normalizers, self.initial, 0.0))

    def ratios(self, moments: Moments) -> dict[str, Tensor]:
        """lambda, (N, K), in the order of `normalizers`."""
        return {"lambda": self._ratios(moments, self._rows(moments))}

    def fixed_mean(self) -> Tensor | None:
        return None if self.training or self.normalizers != ("bn",) else self.running_mean

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        rows = self._rows(moments)
        ratios = self._ratios(moments, rows).split(1, 1)
        weight, bias = self.affine_parameters(moments.mean_NC)
        scale_NC = shift_NC = torch.zeros_like(moments.mean_NC)
        for k, (ratio_N1, (pooled_NC, rstd)) in enumerate(zip(ratios, rows, strict=True)):
            weight_C, bias_C = (p if p.ndim < 2 else p[k] for p in (weight, bias))
            scale_NC = scale_NC + ratio_N1 * (weight_C * rstd)
            value = bias_C if pooled_NC is None else torch.addcmul(bias_C, weight_C, pooled_NC)
            shift_NC = shift_NC + ratio_N1 * value
        return scale_NC, shift_NC

    def _rows(self, moments: Moments) -> list[Row]:
        """xh_nk and 1 / sqrt(var_k + eps) of every normalizer k."""
        rows = []
        for name, (mean, var) in zip(self.normalizers, mixed_statistics(self, self.normalizers, moments), strict=True):
            rstd = torch.rsqrt(var + self.eps)
            rows.append((None if name == "in" else (moments.mean_NC - mean) * rstd, rstd))
        return rows

    def _ratios(self, moments: Moments, rows: list[Row]) -> Tensor:
        features = [self._features(moments, pooled_NC) for pooled_NC, _ in rows]
        products = {
            (i, j): (features[i] * features[j]).sum(1) for i in range(len(features)) for j in range(i, len(features))
        }
        indices = range(len(features))
        correlations = torch.stack([products[min(i, j), max(i, j)] for i in indices for j in indices], 1)
        dtype = correlations.dtype
        hidden = nn.functional.linear(correlations, self.fc1_weight.to(dtype), self.fc1_bias.to(dtype))
        hidden = HIDDEN_ACTIVATIONS[self.hidden_act](hidden)
        logits = nn.functional.linear(hidden, self.fc2_weight.to(dtype), self.fc2_bias.to(dtype))
        return torch.softmax(logits, 1)

    def _features(self, moments: Moments, pooled_NC: Tensor | None) -> Tensor:
        """One normalizer's row of z, (N, C/r); without the convolution of xh, (N, C)."""
        like_NC = moments.mean_NC
        if self.conv_weight is None:
            return torch.zeros_like(like_NC) if pooled_NC is None else pooled_NC
        conv_weight = self.conv_weight.to(like_NC.dtype)
        if pooled_NC is None:
            row_NG = like_NC.new_zeros(like_NC.shape[0], conv_weight.shape[0])
        else:
            row_NG = (pooled_NC.unflatten(1, (-1, self.reduction)) * conv_weight).sum(2)
        return row_NG if self.conv_bias is None else row_NG + self.conv_bias.to(like_NC.dtype)

    def extra_repr(self) -> str:
        conv = f"reduction={self.reduction}" if self.conv_weight is not None else "conv=False"
        return f"{super().extra_repr()}, normalizers={self.normalizers}, {conv}, pi={self.pi}, {self.hidden_act}"
