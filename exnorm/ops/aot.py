"""FX graphs of small tensors compiled by inductor: on the CPU into a shared library that outlives the process.

What torch.compile adds to a call (guards, Python that allocates each buffer) and to a start (importing the compiler,
tracing) costs more than the arithmetic of such a graph. A library is called directly and loaded in a millisecond.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from exnorm.runs.cache import building_in

Run = Callable[[list[Tensor]], Sequence[Tensor]]

# Inductor recomputes what is cheap in every loop that reads it; between small tensors storing it is cheaper. It tries
# out the compiler's vector instructions for 9 seconds; where they fail, the build fails, and that is seen as well. On
# two cores a second thread gains nothing, and where another process holds its core each of 20 loops waits for it.
OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 2,
    "realize_opcount_threshold": 8,
    "cpp.vec_isa_ok": True,
    "cpp.threads": 1,
}


def load(library: Path) -> Run:
    """The function in a library that `build` made."""
    runners: Any = getattr(torch._C, "_aoti")  # noqa: B009  # not in torch's stubs
    return runners.AOTIModelContainerRunnerCpu(str(library), 1).run  # type: ignore[no-any-return]


def build(graph: fx.GraphModule, library: Path) -> None:
    """Compile a graph, traced with symbolic sizes, into a library at this path. The CPU only.

    The caller answers for what the library assumes: contiguous inputs, and sizes as in the graph.
    """
    import torch._inductor

    with building_in(library) as part, _quiet():
        options = {**OPTIONS, "aot_inductor.output_path": str(part)}
        torch._inductor.aot_compile(graph, tuple(_inputs(graph)), options=options)


def compile_here(graph: fx.GraphModule) -> Run:
    """The function of a graph, traced with symbolic sizes, compiled for this process."""
    from torch._inductor.compile_fx import compile_fx

    with _quiet():
        function: Any = compile_fx(graph, _inputs(graph), config_patches=OPTIONS)
    return lambda tensors: function(*tensors)


def _inputs(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's own deprecations, which are no business of who trains a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
