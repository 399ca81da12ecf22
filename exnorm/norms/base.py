"""The base class of all normalizers: it computes the moments of an input, and the output from coefficients.

A normalizer is a subclass of `Norm` that defines `coefficients(moments) -> (scale, shift)`, both (N, C). They belong to
the map `scale * (x - mean) + shift`, where `mean` is the mean of each sample and channel. A normalizer that mixes
others also defines `ratios(moments) -> dict[str, Tensor]`. `Norm.formula` is the complete layer in plain PyTorch.
`install` adds compiled code for the same formula. Legend: N batch, C channels, L positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.norms.statistics import Moments

_LANES = 16  # floats of the widest vector registers


class Norm(nn.Module):
    """y = act(scale * (x - mean) + shift) with (N, C) coefficients that depend on x only through its moments.

    Args:
        num_features: C.
        eps: added to a variance before its square root.
        affine: learn `weight` and `bias`; if False, they are 1 and 0.
        act: an activation fused into the affine pass: None or one of `exnorm.ops.ACTIVATIONS`.
        channel_dim: 1 for (N, C, *spatial), -1 for (N, *spatial, C).
        device: of the parameters.
        dtype: of the parameters.

    Shape: inputs of 2 to 5 dimensions; the output has the input's shape, dtype and memory format. An input without
    elements gives an output without elements, and does not change the running statistics.

    Raises:
        ValueError: an input with another number of dimensions or channels.
    """

    replicas: int = 1
    group: Any = None
    replaced: str | None = None  # the type of the layer that surgery replaced by this one
    took_over: str | None = None  # the path of the activation that this layer applies instead
    adds_residual_of: str | None = None  # the block whose residual this layer adds
    frozen: bool = False  # stays in evaluation mode, also after `train()`; see `exnorm.freeze`
    not_folded: str | None = None  # why `exnorm.fold` left this layer

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        act: str | None = None,
        channel_dim: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops.get_backend()  # chosen now: torch.compile cannot trace the choice
        check_options(
            type(self).__name__,
            num_features=num_features,
            eps=eps,
            act=act,
            channel_dim=channel_dim,
        )
        self.num_features = num_features
        self.eps = eps
        self.channel_dim = channel_dim
        self.fused_act = act
        # The drop and activation of a norm-act layer; set by surgery where they are not fused.
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None
        shape = self.affine_shape()
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(shape, **factory)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape, **factory)) if affine else None

    def __getstate__(self) -> dict[str, Any]:
        # A process group can be neither copied nor pickled. In a copy (EMA, torch.save), BN's scope is one device.
        return {**self.__dict__, "group": None}

    def affine_shape(self) -> tuple[int, ...]:
        """The shape of `weight` and `bias`."""
        return (self.num_features,)

    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters and buffers that grow with `num_features`."""
        shape = self.affine_shape()
        return {"weight": shape, "bias": shape}

    def channel_multiple(self) -> int:
        """The compiled coefficients serve every C that is a multiple of this number."""
        return math.gcd(self.num_features, _LANES)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Return `lr_scale` and `weight_decay`, by name, of the parameters that need other values than the rest."""
        return {}

    def train(self, mode: bool = True) -> "Norm":
        """Like `nn.Module.train`, but a frozen layer stays in evaluation mode."""
        super().train(mode)
        self.training = mode and not self.frozen
        return self

    def reset_parameters(self) -> None:
        """Reset all values to those at construction; here weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return scale_NC and shift_NC of the affine map, in the moments' dtype; `shift` is its value at the mean."""
        raise NotImplementedError

    def constant_mean(self) -> Tensor | None:
        """Return the (C,) mean to subtract if the coefficients do not depend on the input, else None."""
        return None

    def fixed_mean(self) -> Tensor | None:
        """Like `constant_mean`, but a layer may read the values of its ratios, which takes too long for a forward."""
        return self.constant_mean()

    def moments(self, x: Tensor) -> Moments:
        """Return the moments of an input, for `ratios`. They do not change the running statistics."""
        self.check_input(x)
        mean_NC, var_NC, _ = ops.moments(x, channel_dim=self.channel_dim)
        return self._scoped(mean_NC, var_NC, x)._replace(record=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the normalized input. `residual` is added before the activation, in the same pass if possible."""
        if isinstance(x, fx.Proxy):
            return leaf(self, x, residual)
        if residual is None or self._can_add(residual, x):
            return self._forward(x, residual, self.fused_act)
        y = self._forward(x, None, None) + residual
        return y if self.fused_act is None else ops.ACTIVATIONS[self.fused_act].apply_(y)

    def _can_add(self, residual: Tensor, x: Tensor) -> bool:
        """Whether the affine pass can add a residual. After a sum, only a ReLU's derivative follows from the output."""
        if self.fused_act not in (None, "relu"):
            return False
        if torch.jit.is_tracing():
            return True
        return residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        # In a trace the sizes are tensors: checking them would warn, and check nothing.
        if not torch.jit.is_tracing():
            if x.numel() == 0:
                Norm.check_input(self, x)
                return self._empty(x)
            self.check_input(x)
        y = _faster(self, x, residual, act)
        if y is None:
            y = without_autocast(type(self).formula, self, x, residual, act)
        if self.drop is not None:
            y = self.drop(y)
        return y if self.act is None else self.act(y)

    def _empty(self, x: Tensor) -> Tensor:
        """Return an output without elements. Its gradients are zero; it takes part in BN's scope over processes."""
        anchors = [parameter.sum() for parameter in self._parameters.values() if parameter is not None]
        if self.scope()[1] is not None:
            sums_NC = x.to(ops.statistics_dtype(x)).sum(ops.spatial_dims(x, self.channel_dim))
            anchors += [c.sum() for c in self.coefficients(self._scoped(sums_NC, sums_NC, x))]
        return x * torch.stack([anchor.to(x.dtype) for anchor in anchors]).sum() if anchors else x.clone()

    def formula(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        """act(scale * (x - mean) + shift + residual), by the back end's passes: the layer without compiled code."""
        channel_dim = self.channel_dim
        source, moments = x, self.constant_moments(x)
        if moments is None:
            at_once = act if residual is None else None
            mean_NC, var_NC, source = ops.moments(x, channel_dim=channel_dim, act=at_once)
            moments = self._scoped(mean_NC, var_NC, x)
        scale_NC, shift_NC = self.coefficients(moments)
        return ops.affine(
            source, moments.mean_NC, scale_NC, shift_NC, residual=residual, channel_dim=channel_dim, act=act
        )

    def constant_moments(self, x: Tensor) -> Moments | None:
        """Return placeholder moments if the coefficients do not depend on the input, else None."""
        mean_C = self.constant_mean()
        if mean_C is None:
            return None
        mean_NC = mean_C.to(ops.statistics_dtype(x)).expand(x.shape[0], -1)
        return Moments(mean_NC, torch.zeros_like(mean_NC), ops.length(x, self.channel_dim))

    def scope(self) -> tuple[int, Any]:
        """BN's scope: how many replicas this device holds, and the process group that one replica spans, or None."""
        return self.replicas, self.group

    def _scoped(self, mean_NC: Tensor, var_NC: Tensor, x: Tensor) -> Moments:
        return Moments(mean_NC, var_NC, ops.length(x, self.channel_dim), *self.scope())

    def check_input(self, x: Tensor) -> None:
        """Raise an error for an input that this layer cannot normalize.

        Raises:
            ValueError: see the class. The message says what was given and what is allowed.
        """
        if not 2 <= x.ndim <= 5:
            raise UserError(
                f"{type(self).__name__} takes inputs of 2 to 5 dimensions, (N, C, *spatial), not {tuple(x.shape)}"
            )
        if x.shape[self.channel_dim] != self.num_features:
            raise UserError(
                f"{type(self).__name__}({self.num_features}) got {x.shape[self.channel_dim]} channels in dimension "
                f"{self.channel_dim} of {tuple(x.shape)}; channel_dim=1 is (N, C, *spatial), -1 is (N, *spatial, C)"
            )

    def affine_parameters(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias in the dtype of `like`; 1 and 0 if the layer has none."""
        dtype = like.dtype
        weight = like.new_ones(()) if self.weight is None else self.weight.to(dtype)
        bias = like.new_zeros(()) if self.bias is None else self.bias.to(dtype)
        return weight, bias

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}"
        text += "" if self.weight is not None else ", affine=False"
        text += "" if self.fused_act is None else f", act={self.fused_act!r}"
        return text + ("" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}")


Normalize = Callable[[Norm, Tensor, Tensor | None, str | None], Tensor | None]


def _no_code(norm: Norm, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor | None:
    return None


_faster: Normalize = _no_code


def install(normalize: Normalize) -> None:
    """Make all layers call this function before their formula. It returns None if it has no code for a call."""
    global _faster
    _faster = normalize


def without_autocast(function: Callable[..., Any], norm: Norm, x: Tensor, *args: Any) -> Any:
    """Call `function(norm, x, *args)` with autocast off: the formula chooses the dtype of its statistics itself."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # autocast knows no meta device
        with torch.autocast(x.device.type, enabled=False):
            return function(norm, x, *args)
    return function(norm, x, *args)


def fold(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, moments: Moments
) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * weight + bias as scale * (x - moments.mean_NC) + shift, (N, C) both."""
    scale_NC = (weight * torch.rsqrt(var + eps)).expand_as(moments.mean_NC)
    return scale_NC, torch.addcmul(bias, scale_NC, moments.mean_NC - mean)


def leaf(layer: nn.Module, x: fx.Proxy, *others: Any) -> Any:
    """Record a layer as one call in a symbolic trace, as for torch's own layers, with any tracer."""
    tracer: Any = x.tracer
    args = (x, *[other for other in others if other is not None])
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})


def check_options(owner: str, **options: Any) -> None:
    """Raise an error for impossible values of the options that all normalizers share.

    Raises:
        ValueError: the message names the option, its value and what is allowed.
    """
    rules = {
        "num_features": (lambda v: isinstance(v, int) and v > 0, "a positive integer"),
        "eps": (
            lambda v: isinstance(v, int | float) and v >= 0,
            "a number from 0 up, such as 1e-5",
        ),
        "act": (
            lambda v: v is None or v in ops.ACTIVATIONS,
            f"None, {', '.join(ops.ACTIVATIONS)}",
        ),
        "channel_dim": (
            lambda v: v in (1, -1),
            "1 for (N, C, *spatial) or -1 for (N, *spatial, C)",
        ),
        "momentum": (
            lambda v: v is None or (isinstance(v, int | float) and 0 <= v <= 1),
            "0 to 1, or None",
        ),
    }
    for name, value in options.items():
        accepts, allowed = rules[name]
        if not accepts(value):
            raise UserError(f"{owner}: {name}={value!r} is not possible; allowed: {allowed}")


def largest_divisor(number: int, limit: int, option: str) -> int:
    """The largest divisor of `number` that is at most `limit`.

    Raises:
        ValueError: the limit is not a positive integer; the message calls it `option`.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UserError(f"{option}={limit!r} is not possible; allowed: an integer from 1 up")
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)
