"""A whole layer on the compiled back end: streaming passes, and the small graph between them as one compiled piece.

    forward    m, v = moments(x)        a, b = coefficients(m, v)         y = act(a * (x - m) + b)
    backward   da, db = sums(g, x)      dm, dv, parameters: the vector-Jacobian product of `coefficients`      dx

Nothing is written by hand for a normalizer: its `coefficients` is traced forward, and again with its transpose
(`torch.func.vjp`) for the backward. Saved for backward are x and (N, C) tensors.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from exnorm import ops
from exnorm.norms.statistics import Moments
from exnorm.ops import compiled
from exnorm.ops.pieces import NotCompiledError, Piece

# Inductor recomputes what is cheap in every loop that reads it; between (N, C) tensors storing it is cheaper.
_STORE_EARLY = {"realize_reads_threshold": 2, "realize_opcount_threshold": 8}
_NOT_PART_OF_THE_FORMULA = ("num_features", "replaced", "took_over", "fused_act", "channel_dim")


_Vjp = tuple[tuple[Tensor, Tensor], Callable[[tuple[Tensor, Tensor]], tuple[Tensor, ...]]]


class LayerPieces(NamedTuple):
    """The compiled coefficients of one kind of layer, and their gradient."""

    coefficients: Piece
    gradient: Piece


def runs_compiled(norm: Any, x: Tensor) -> bool:
    """Whether this call goes through the compiled layer: not where one scope spans processes, nor while tracing."""
    return (
        ops.get_backend() == "compiled"
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and norm.scope()[1] is None
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def normalize(norm: Any, x: Tensor) -> Tensor | None:
    """The normalized input, with the fused activation; None where the coefficients cannot be compiled."""
    learned, buffers = _tensors(norm._parameters), _tensors(norm._buffers)
    key = _formula(norm, tuple(learned), tuple(buffers))
    if key not in _pieces:
        _pieces[key] = _build(norm, tuple(learned), tuple(buffers))
    pieces = _pieces[key]
    if pieces is None:
        return None
    try:
        return _Layer.apply(x, norm, pieces, buffers, *learned.values())  # type: ignore[no-any-return]
    except NotCompiledError:
        _pieces[key] = None
        return None


def _tensors(named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named.items() if tensor is not None}


_pieces: dict[Hashable, LayerPieces | None] = {}


def _formula(norm: Any, learned: tuple[str, ...], buffers: tuple[str, ...]) -> Hashable:
    """What the layers that share their pieces have in common: class, options, mode and names of tensors."""
    values = [(n, v) for n, v in norm.__dict__.items() if n[0] != "_" and n not in _NOT_PART_OF_THE_FORMULA]
    return type(norm), tuple(values), norm.scope()[0], learned, buffers


def _build(norm: Any, learned: tuple[str, ...], buffers: tuple[str, ...]) -> LayerPieces:
    wrapper, replicas, training = _Coefficients(_template(norm)), norm.scope()[0], norm.training
    unread = [name.startswith("pending") for name in buffers]

    def call(names: tuple[str, ...], tensors: Any, moments: Moments) -> tuple[Tensor, Tensor]:
        values = {f"norm.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        return torch.func.functional_call(wrapper, values, (moments,))

    def coefficients(mean_NC: Tensor, var_NC: Tensor, length: int, *tensors: Tensor) -> Any:
        # The backward must read what the forward read, also where the forward then changes it.
        read = [t.clone() for t, skip in zip(tensors[len(learned) :], unread, strict=True) if training and not skip]
        moments = Moments(mean_NC, var_NC, length, replicas)
        scale_NC, shift_NC = call(learned + buffers, tensors, moments)
        return scale_NC.contiguous(), shift_NC.contiguous(), *read

    def gradient(
        dscale_NC: Tensor, dshift_NC: Tensor, mean_NC: Tensor, var_NC: Tensor, length: int, *tensors: Tensor
    ) -> Any:
        names = learned + tuple(name for name, skip in zip(buffers, unread, strict=True) if not skip)

        def formula(mean_NC: Tensor, var_NC: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            moments = Moments(mean_NC, var_NC, length, replicas, record=False)
            return call(names, values + tensors[len(learned) :], moments)

        output, transpose = cast("_Vjp", torch.func.vjp(formula, mean_NC, var_NC, *tensors[: len(learned)]))
        dmean_NC, dvar_NC, *dlearned = transpose((dscale_NC, dshift_NC))
        return dvar_NC * (2 / length), (dmean_NC - output[0] * dshift_NC) / length, *dlearned

    options: dict[str, Any] = {"or_eager": False, **_STORE_EARLY}
    return LayerPieces(Piece(coefficients, **options), Piece(gradient, **options))


class _Coefficients(nn.Module):
    """`norm.coefficients` as a forward, which `torch.func.functional_call` can give other tensors."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return self.norm.coefficients(moments)  # type: ignore[operator]


def _template(norm: nn.Module) -> nn.Module:
    """The layer without its values, which would otherwise live as long as the compiled code."""
    template = object.__new__(type(norm))
    meta = {
        group: {n: None if t is None else torch.empty_like(t, device="meta") for n, t in norm.__dict__[group].items()}
        for group in ("_parameters", "_buffers")
    }
    template.__dict__ = {**norm.__dict__, **meta, "_modules": {}}
    del template.__dict__["num_features"]  # differs between the layers that share the compiled code
    return template


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, pieces: LayerPieces, buffers: dict[str, Tensor], *learned: Tensor
    ) -> Tensor:
        ctx.channel_dim, ctx.act, ctx.length = norm.channel_dim, norm.fused_act, ops.length(x, norm.channel_dim)
        constant = norm.constant_moments(x)
        ctx.is_constant = constant is not None
        if constant is None:
            mean_NC, var_NC = compiled.moments(x, norm.channel_dim)
        else:
            mean_NC, var_NC = constant.mean_NC.contiguous(), constant.var_NC
        ctx.pieces, new = pieces, not pieces.gradient.compiled
        tensors = [t.detach() for t in learned]
        scale_NC, shift_NC, *read = pieces.coefficients(mean_NC, var_NC, ctx.length, *tensors, *buffers.values())
        if not norm.training:
            read = [t for n, t in buffers.items() if not n.startswith("pending")]
        if new and any(ctx.needs_input_grad):  # what fails to compile should fail here, where another way is open
            pieces.gradient(scale_NC, shift_NC, mean_NC, var_NC, ctx.length, *tensors, *read)
        ctx.save_for_backward(x, mean_NC, var_NC, scale_NC, shift_NC, *learned, *read)
        return compiled.affine(x, mean_NC, scale_NC, shift_NC, ctx.channel_dim, ctx.act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean_NC, var_NC, *rest = ctx.saved_tensors
        (scale_NC, shift_NC), tensors = rest[:2], [t.detach() for t in rest[2:]]
        layout = (ctx.channel_dim, ctx.act)
        sums = compiled.affine_sums(grad, x, mean_NC, scale_NC, shift_NC, *layout)
        slope_NC, offset_NC, *dlearned = ctx.pieces.gradient(*sums, mean_NC, var_NC, ctx.length, *tensors)
        if ctx.is_constant:
            slope_NC = offset_NC = None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = compiled.input_gradient(grad, x, mean_NC, scale_NC, shift_NC, slope_NC, offset_NC, *layout)
        return dx, None, None, None, *dlearned
