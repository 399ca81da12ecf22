"""The compiled coefficients of a kind of layer: traced once, compiled once per machine, then loaded from the cache.

The cache keeps the libraries under a hash. For the normalizers of this package, the hash covers the formula's options
and the package's sources, so nothing is traced if a library exists. For other classes, it covers the traced graphs and
the dtypes and shapes of their inputs. A file next to each library lists what the library assumes of its inputs. Before
a library is used, these assumptions are compared with the layer.
"""

import functools
import hashlib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from exnorm.norms.compiled.graphs import Graphs, InputSpec, input_specs, trace
from exnorm.norms.compiled.key import options_of, tensors_of
from exnorm.ops import aot, native
from exnorm.ops.backend import say_compiling
from exnorm.ops.guardless import warn_once, without_saved_tensor_hooks
from exnorm.ops.layout import statistics_dtype
from exnorm.runs.cache import cache_folder, processor
from exnorm.runs.folder import write_json_atomic

NORMS = Path(__file__).parents[1]


class CoefficientCode:
    """The compiled coefficients of one kind of layer, and their gradient.

    Attributes:
        coefficients, gradient: see `exnorm.norms.compiled.graphs`; None until `prepare` has loaded them.
        read: the names of the buffers that the gradient reads.
        multiple: the number of channels in each of the graph's G groups.
    """

    def __init__(self, key: Hashable, multiple: int) -> None:
        self.coefficients: aot.Run | None = None
        self.gradient: aot.Run | None = None
        self.read: tuple[str, ...] = ()
        self.multiple = multiple
        self._inputs: list[InputSpec] = []
        self._key = key
        self._graphs: Graphs | None = None

    def prepare(self, norm: Any, like: Tensor, *, gradient: bool) -> None:
        """Load or compile the missing functions, for a layer of this kind and an input like this."""
        with without_saved_tensor_hooks():
            if self.coefficients is None:
                self.coefficients = self._function("coefficients", norm, like)
            if gradient and self.gradient is None:
                self.gradient = self._function("gradient", norm, like)
        self._check(norm)
        if self.gradient is not None:
            self._graphs = None

    def _check(self, norm: Any) -> None:
        """Compare a layer's tensors with what the code assumes, in the order in which the code takes them.

        Raises:
            RuntimeError: the code was compiled for other tensors.
        """
        learned, buffers = tensors_of(norm)
        groups = norm.num_features // self.multiple
        given = [(name, str(t.dtype), list(t.shape)) for name, t in (*learned.items(), *buffers.items())]
        expected = [(name, dtype, [a + b * groups for a, b in sizes]) for name, dtype, sizes in self._inputs]
        if given != expected or groups * self.multiple != norm.num_features:
            raise RuntimeError(f"the compiled code is for layers with tensors {expected}; this layer has {given}")

    def _function(self, which: str, norm: Any, like: Tensor) -> aot.Run:
        if like.device.type != "cpu":
            graphs = self._traced(norm, like)
            self.read, self._inputs = graphs.read, input_specs(graphs)
            return aot.compile_here(getattr(graphs, which))
        folder = self._folder(norm, like)
        library, facts = folder / f"{which}.so", folder / "facts.json"
        if not library.exists():
            graphs = self._traced(norm, like)
            write_json_atomic(facts, {"read": graphs.read, "inputs": input_specs(graphs)})
            say_compiling(f"the {which} of {type(norm).__name__}, once per machine (about 15 seconds)")
            with native.compiled_meanwhile():
                aot.build(getattr(graphs, which), library)
        assumed = json.loads(facts.read_text(encoding="utf-8"))
        self.read, self._inputs = tuple(assumed["read"]), [tuple(fact) for fact in assumed["inputs"]]
        return aot.load(library)

    def _folder(self, norm: Any, like: Tensor) -> Path:
        packages = ("exnorm.norms.", "torch.", "builtins.")
        if all(f"{cls.__module__}.".startswith(packages) for cls in type(norm).__mro__):
            formula: Any = (self._key, _sources())
        else:
            formula = [
                _text(graph) for graph in (self._traced(norm, like).coefficients, self._traced(norm, like).gradient)
            ]
        facts = repr((formula, aot.OPTIONS, torch.__version__, processor()))
        folder = cache_folder() / f"{type(norm).__name__}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        return folder

    def _traced(self, norm: Any, like: Tensor) -> Graphs:
        if self._graphs is None:
            self._graphs = trace(norm, statistics_dtype(like), like.device, norm.scope()[0])
        return self._graphs


def code_of(norm: Any, like: Tensor, *, gradient: bool) -> CoefficientCode | None:
    """Return the code of a layer for an input like this. If it cannot be compiled, warn once and return None."""
    key = _key(norm, like)
    if key not in _codes:
        _codes[key] = CoefficientCode(key, norm.channel_multiple())
    code = _codes[key]
    try:
        if code is not None:
            code.prepare(norm, like, gradient=gradient)
    except Exception as problem:  # noqa: BLE001  # whatever the error, the eager formula still works
        warn_once(type(norm).__name__, problem)
        code = _codes[key] = None
    return code


_codes: dict[Hashable, CoefficientCode | None] = {}


def _key(norm: Any, like: Tensor) -> Hashable:
    """Return the key under which layers share code: class, options, mode, and tensors, without the value of C."""
    growing = norm.channel_shapes()
    learned, buffers = tensors_of(norm)
    tensors = [
        (name, str(t.dtype), str(t.device), None if name in growing else tuple(t.shape))
        for name, t in (*learned.items(), *buffers.items())
    ]
    facts = (str(statistics_dtype(like)), str(like.device), norm.channel_multiple())
    return (*options_of(norm), *facts, tuple(tensors))


@functools.cache
def _sources() -> str:
    """Return a hash of the source files that define the graphs."""
    files = [file for folder in (NORMS, NORMS / "compiled") for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _text(graph: fx.GraphModule) -> str:
    """Return a graph's code, with the constants and the dtypes and shapes of its inputs, which the code leaves out."""
    constants = [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    facts = [(str(t.dtype), str(t.device), str(tuple(t.shape)), str(t.stride())) for t in inputs]
    return graph.code + repr([(c.dtype, c.tolist()) if isinstance(c, Tensor) else c for c in constants]) + repr(facts)
