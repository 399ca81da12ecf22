"""The normalizers, written exactly as in the papers: slow, memory-hungry, independent of `exnorm.ops`.

They are for tests and benchmarks. Every statistic is computed from `x` itself, and every normalized map is stored, in
the dtype of `x`. Autograd computes the gradients. Legend: N batch, C channels, K normalizers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Running = tuple[Tensor, Tensor]


def _over(x: Tensor, scope: str) -> tuple[int, ...]:
    """Return the dimensions of (N, C, *spatial) over which a statistic of this scope is taken."""
    spatial = tuple(range(2, x.ndim))
    return {"in": spatial, "ln": (1, *spatial), "bn": (0, *spatial)}[scope]


def statistics(x: Tensor, scope: str, running: Running | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a scope (in, ln, bn), broadcastable to `x`; BN's from `running` if given."""
    if scope == "bn" and running is not None:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return running[0].to(x.dtype).reshape(shape), running[1].to(x.dtype).reshape(shape)
    dims = _over(x, scope)
    if not dims:
        return x, torch.zeros_like(x)
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).pow(2).mean(dims, keepdim=True)


def _channels(parameter_C: Tensor, x: Tensor) -> Tensor:
    return parameter_C.reshape(1, -1, *(1,) * (x.ndim - 2))


def normalize(
    x: Tensor,
    scope: str,
    parameters: Mapping[str, Tensor],
    eps: float,
    running: Running | None,
) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias for one of in, ln, bn."""
    mean, var = statistics(x, scope, running)
    weight, bias = _channels(parameters["weight"], x), _channels(parameters["bias"], x)
    return weight * (x - mean) / torch.sqrt(var + eps) + bias


def group_norm(x: Tensor, parameters: Mapping[str, Tensor], eps: float, num_groups: int) -> Tensor:
    """GN: every group of channels of a sample has a mean and a variance."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    var = (grouped - mean).pow(2).mean(2, keepdim=True)
    normalized = ((grouped - mean) / torch.sqrt(var + eps)).reshape(x.shape)
    return _channels(parameters["weight"], x) * normalized + _channels(parameters["bias"], x)


def softmax(logits: Tensor) -> Tensor:
    """SN's ratios."""
    return torch.softmax(logits, 0)


def switch_norm(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    eps: float,
    normalizers: Sequence[str],
    running: Running | None = None,
    ratios: Callable[[Tensor], Tensor] = softmax,
) -> Tensor:
    """SN: one normalization with mixed statistics. `ratios` maps the logits to ratios; the default is softmax."""
    mean_ratio, var_ratio = ratios(parameters["mean_weight"]), ratios(parameters["var_weight"])
    pairs = [statistics(x, scope, running) for scope in normalizers]
    mean = torch.stack([(w * m).expand_as(x) for w, (m, _) in zip(mean_ratio, pairs, strict=True)]).sum(0)
    var = torch.stack([(w * v).expand_as(x) for w, (_, v) in zip(var_ratio, pairs, strict=True)]).sum(0)
    normalized = (x - mean) / torch.sqrt(var + eps)
    return _channels(parameters["weight"], x) * normalized + _channels(parameters["bias"], x)


def sparsemax(logits: Tensor) -> Tensor:
    """The nearest point of the simplex, by sorting (Martins and Astudillo, 2016)."""
    ranked = logits.sort(descending=True).values
    sums = ranked.cumsum(0) - 1
    support = int((ranked * torch.arange(1, len(logits) + 1) > sums).sum())
    return (logits - sums[support - 1] / support).clamp(min=0)


def batch_renorm(
    x: Tensor, parameters: Mapping[str, Tensor], eps: float, running: Running, limits: tuple[float, float]
) -> Tensor:
    """BRN in training: BN, corrected towards the running statistics by r and d within their limits."""
    (mean, var), (old_mean, old_var) = statistics(x, "bn"), statistics(x, "bn", running)
    r_max, d_max = limits
    r = (torch.sqrt(var + eps) / torch.sqrt(old_var + eps)).clamp(1 / r_max, r_max).detach()
    d = ((mean - old_mean) / torch.sqrt(old_var + eps)).clamp(-d_max, d_max).detach()
    normalized = (x - mean) / torch.sqrt(var + eps) * r + d
    return _channels(parameters["weight"], x) * normalized + _channels(parameters["bias"], x)


def exemplar_ratios(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    eps: float,
    normalizers: Sequence[str],
    running: Running | None = None,
    hidden_act: str = "tanh",
) -> Tensor:
    """EN's lambda, (N, K): pooling, convolution, correlations of the normalizers, two layers, softmax."""
    pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
    rows = []
    for scope in normalizers:
        mean, var = (s.expand_as(x).flatten(2)[..., 0] if x.ndim > 2 else s for s in statistics(x, scope, running))
        row = (pooled - mean) / torch.sqrt(var + eps)
        if "conv_weight" in parameters:
            outputs, reduction = parameters["conv_weight"].shape
            weight = parameters["conv_weight"].reshape(outputs, reduction, 1)
            bias = parameters.get("conv_bias")
            row = torch.nn.functional.conv1d(row[..., None], weight, bias, groups=outputs)[..., 0]
        rows.append(row)
    z = torch.stack([row.expand_as(rows[0]) for row in rows], 1)
    v = torch.einsum("nic,njc->nij", z, z).flatten(1)
    hidden = v @ parameters["fc1_weight"].T + parameters["fc1_bias"]
    hidden = torch.tanh(hidden) if hidden_act == "tanh" else hidden.clamp(min=0)
    return torch.softmax(hidden @ parameters["fc2_weight"].T + parameters["fc2_bias"], 1)


def exemplar_norm(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    eps: float,
    normalizers: Sequence[str],
    running: Running | None = None,
    hidden_act: str = "tanh",
) -> Tensor:
    """EN: the normalized maps, mixed by each sample's ratios."""
    ratio_NK = exemplar_ratios(x, parameters, eps, normalizers, running, hidden_act)
    y = torch.zeros_like(x)
    for k, scope in enumerate(normalizers):
        affine = {
            name: parameters[name][k] if parameters[name].ndim == 2 else parameters[name] for name in ("weight", "bias")
        }
        ratio = ratio_NK[:, k].reshape(-1, *(1,) * (x.ndim - 1))
        y = y + ratio * normalize(x, scope, affine, eps, running)
    return y
