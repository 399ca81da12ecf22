"""Compile FX graphs of small tensors with inductor ahead of time: on the CPU into a shared library for later processes.

For such graphs, the overhead of torch.compile exceeds the arithmetic. Each call checks guards and allocates each buffer
in Python; each start imports the compiler and traces. A library is called directly and loaded in a millisecond.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from exnorm.ops.guardless import without_warnings
from exnorm.runs.cache import building_in

Run = Callable[[list[Tensor]], Sequence[Tensor]]

# realize_*: inductor recomputes cheap values in every loop that reads them; for small tensors, storing them is faster.
# vec_isa_ok: skips inductor's test of the vector instructions, which takes 9 seconds. If they fail, the build fails.
# threads: on two cores a second thread gains nothing, and each of 20 loops waits if another process uses its core.
OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 2,
    "realize_opcount_threshold": 8,
    "cpp.vec_isa_ok": True,
    "cpp.threads": 1,
}


def load(library: Path) -> Run:
    """Load the function from a library that `build` made."""
    runners: Any = getattr(torch._C, "_aoti")  # noqa: B009  # not in torch's stubs
    return runners.AOTIModelContainerRunnerCpu(str(library), 1).run  # type: ignore[no-any-return]


def build(graph: fx.GraphModule, library: Path) -> None:
    """Compile a graph, traced with symbolic sizes, into a library at this path. CPU only.

    The library does not check its inputs. The caller must give contiguous ones, with sizes that fit the graph.
    """
    with building_in(library) as part, without_warnings():
        import torch._inductor

        options = {**OPTIONS, "aot_inductor.output_path": str(part)}
        torch._inductor.aot_compile(graph, tuple(_inputs(graph)), options=options)


def compile_here(graph: fx.GraphModule) -> Run:
    """Compile a graph, traced with symbolic sizes, for this process only, and return its function."""
    with without_warnings():
        from torch._inductor.compile_fx import compile_fx

        function: Any = compile_fx(graph, _inputs(graph), config_patches=OPTIONS)
    return lambda tensors: function(*tensors)


def _inputs(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
