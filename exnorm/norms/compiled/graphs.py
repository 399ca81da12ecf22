"""A normalizer's coefficient computation, moments -> coefficients, and its gradient, as FX graphs with symbolic sizes.

Both are traced from `Norm.coefficients`, so a new normalizer needs no code here. The sizes are N and C = G times
`channel_multiple()`, where N and G are symbols that all inputs share. So inductor knows which sizes divide which.
Otherwise its loops over (N, C) tensors would be several times slower.

    coefficients   (sizes, length, m, v, parameters, buffers)                -> a, b, copies of the buffers in `read`
    gradient       (sizes, length, da, db, a, m, v, parameters, `read`)      -> 2 dv / L, dm / L, dparameters

`sizes` is any (N, G) tensor; its shape sets the symbols. `length` is a 0-dimensional tensor with L.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from exnorm.norms.compiled.key import tensors_of
from exnorm.norms.statistics import Moments
from exnorm.ops.streaming import fitted

SAMPLES, GROUPS = 32, 17  # inductor decides for these sizes where to use a second thread; any sizes above 1 are correct


# The name of a tensor of the layer, its dtype, and each of its sizes as (a, b) for a + b * G.
InputSpec = tuple[str, str, list[tuple[int, int]]]


class Graphs(NamedTuple):
    """The two graphs, the names of the buffers that the gradient reads, and those of all parameters and buffers."""

    coefficients: fx.GraphModule
    gradient: fx.GraphModule
    read: tuple[str, ...]
    names: tuple[str, ...]


def input_specs(graphs: Graphs) -> list[InputSpec]:
    """Return what the graphs assume of a layer's parameters and buffers, in their order."""
    nodes = [node for node in graphs.coefficients.graph.nodes if node.op == "placeholder"]
    sizes, *_ = nodes
    groups = sizes.meta["val"].shape[1].node.expr

    def linear(size: Any) -> tuple[int, int]:
        expression: Any = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression is None:
            return int(size), 0
        at = [int(expression.subs(groups, value)) for value in (1, 2)]
        return 2 * at[0] - at[1], at[1] - at[0]

    tensors = [node.meta["val"] for node in nodes[len(nodes) - len(graphs.names) :]]
    return [
        (name, str(t.dtype), [linear(size) for size in t.shape]) for name, t in zip(graphs.names, tensors, strict=True)
    ]


def trace(norm: Any, dtype: torch.dtype, device: torch.device, replicas: int) -> Graphs:
    """Trace a layer's formula and its gradient, for any number of samples and channels.

    Args:
        dtype, device: of the moments.

    Raises:
        RuntimeError: a formula that holds only for some sizes.
    """
    sizes = _symbolic_sizes(samples=max(SAMPLES // replicas, 2) * replicas)
    template = _template(norm, sizes.shape[1] * norm.channel_multiple())
    tensors = _fakes(norm, template.norm.channel_shapes(), sizes)
    shape_NC = (sizes.shape[0], template.norm.num_features)
    with sizes.fake_mode:
        length = torch.empty((), dtype=torch.float64, device=device)
        moments_NC = [torch.empty(shape_NC, dtype=dtype, device=device) for _ in range(5)]
    names, learned = tuple(tensors), len(tensors_of(norm)[0])
    formula = _Formula(template, names, replicas)
    gradient = torch.func.functionalize(_gradient_of(formula, learned))
    gradient_graph = _trace(gradient, sizes, length, *moments_NC, *tensors.values())
    read = _drop_unread(gradient_graph, names[learned:])
    # In training the forward moves buffers that the gradient reads, so it returns copies of them from before.
    coefficients = _copying(formula, read if norm.training else ())
    graph = _trace(coefficients, sizes, length, *moments_NC[:2], *tensors.values())
    return Graphs(graph, gradient_graph, read, names)


class _Formula(NamedTuple):
    """A layer's coefficients as a function of all that they depend on."""

    template: nn.Module
    names: tuple[str, ...]
    replicas: int

    def __call__(self, values: Sequence[Tensor], mean_NC: Tensor, var_NC: Tensor, length: Any) -> tuple[Tensor, ...]:
        """(scale, shift), from parameters and buffers in the order of `names`."""
        moments = Moments(mean_NC, var_NC, length, self.replicas)
        named = {f"norm.{name}": value for name, value in zip(self.names, values, strict=True)}
        coefficients = torch.func.functional_call(self.template, named, (moments,))
        return tuple([fitted(coefficient, mean_NC) for coefficient in coefficients])


def _copying(formula: _Formula, copied: Sequence[str]) -> Callable[..., list[Tensor]]:
    """The coefficients, and copies of some tensors from before the formula ran."""

    def coefficients(_: Tensor, length: Tensor, mean_NC: Tensor, var_NC: Tensor, *values: Tensor) -> list[Tensor]:
        copies = [value.clone() for name, value in zip(formula.names, values, strict=True) if name in copied]
        return [c.contiguous() for c in formula(values, mean_NC, var_NC, length)] + copies

    return coefficients


def _gradient_of(formula: _Formula, learned: int) -> Callable[..., list[Tensor]]:
    """The vector-Jacobian product of a formula; the first `learned` of its tensors are parameters."""

    def gradient(_: Tensor, length: Tensor, *given: Tensor) -> list[Tensor]:
        dscale_NC, dshift_NC, scale_NC, mean_NC, var_NC, *values = given
        parameters, buffers = values[:learned], values[learned:]
        moved = [buffer for buffer in buffers if buffer.is_floating_point()]

        def forward(mean_NC: Tensor, var_NC: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
            # The buffers move as they did in the forward, in copies: it may have read them before or after.
            copies = iter([primal.clone() for primal in primals[learned:]])
            replayed = [next(copies) if buffer.is_floating_point() else buffer.clone() for buffer in buffers]
            return formula((*primals[:learned], *replayed), mean_NC, var_NC, length)

        transpose: Any = torch.func.vjp(forward, mean_NC, var_NC, *parameters, *moved)[1]
        dmean_NC, dvar_NC, *dlearned = transpose((dscale_NC, dshift_NC))[: 2 + learned]
        results = dvar_NC * (2 / length), (dmean_NC - scale_NC * dshift_NC) / length, *dlearned
        return [result.contiguous() for result in results]

    return gradient


def _fakes(norm: nn.Module, growing: dict[str, tuple[int, ...]], sizes: Any) -> dict[str, Tensor]:
    """Return a layer's parameters, then its buffers, without values. Those that grow with C have symbolic shapes."""
    learned, buffers = tensors_of(norm)
    named = {**learned, **buffers}
    with sizes.fake_mode:
        return {
            n: torch.empty(growing.get(n, tuple(t.shape)), dtype=t.dtype, device=t.device) for n, t in named.items()
        }


class _Coefficients(nn.Module):
    """`norm.coefficients` as a forward, in which `torch.func.functional_call` can replace the tensors."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm: Any = norm

    def forward(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return self.norm.coefficients(moments)


def _template(norm: nn.Module, num_features: Any) -> _Coefficients:
    """Return a copy of a layer with a symbolic number of channels."""
    template = object.__new__(type(norm))
    learned, buffers = tensors_of(norm)
    template.__dict__ = {
        **{name: value for name, value in norm.__dict__.items() if name not in buffers},
        "_parameters": {**norm._parameters, **learned},
        "_buffers": {**norm._buffers, **buffers},
        "_modules": {},
        "num_features": num_features,
    }
    return _Coefficients(template)


def _symbolic_sizes(samples: int) -> Any:
    """Return a fake (N, G) tensor with symbols as sizes. It has its mode as `fake_mode`."""
    environment = ShapeEnv(duck_shape=False)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    mode = FakeTensorMode(shape_env=environment)
    return mode.from_tensor(torch.empty(samples, GROUPS), symbolic_context=context)


def _trace(function: Callable[..., Any], sizes: Tensor, *args: Tensor) -> fx.GraphModule:
    with enable_python_dispatcher(), torch.no_grad():
        graph = make_fx(function)(sizes, *args)
    if not all(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in sizes.shape):
        raise RuntimeError(
            "its coefficients hold only for some sizes: a tensor that grows with num_features is missing in "
            "channel_shapes(), or a size is used as a number"
        )
    return graph


def _drop_unread(graph: fx.GraphModule, buffers: Sequence[str]) -> tuple[str, ...]:
    """Remove the buffers that a graph does not read from its last inputs. Return the names of the others."""
    graph.graph.eliminate_dead_code()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][-len(buffers) :] if buffers else []
    read = []
    for name, node in zip(buffers, inputs, strict=True):
        if node.users:
            read.append(name)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return tuple(read)
