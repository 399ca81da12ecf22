"""The layer with compiled code and inside `torch.compile`. Compilation takes seconds to a minute."""

import copy
import itertools
import warnings

import torch

from exnorm.norms import set_progress
from exnorm.ops import using_backend
from exnorm.testing.layers import Check, Layer, assert_same, step

EAGERLY = "runs eagerly"  # what the compiled back end warns of where it has no code for a layer


def is_the_same_compiled(layer: Layer) -> None:
    """The compiled back end gives the eager one's output, gradients and buffers, also with a residual."""
    for training, shape in itertools.product((True, False), ((4, 3, 5), (1, 6, 6))):
        x, grad, residual = (layer.input(*shape, seed=seed) for seed in range(3))
        results = []
        for backend in ("eager", "compiled"):
            with using_backend(backend), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                norm = layer.build(act="relu").train(training)
                set_progress(norm, 0.2)
                results += [step(norm, x, grad), step(norm, x, grad, residual)]
            slow = [str(warning.message) for warning in caught if EAGERLY in str(warning.message)]
            assert not slow, slow[0]
        assert_same(results[2], results[0], rtol=1e-6, atol=1e-8)
        assert_same(results[3], results[1], rtol=1e-6, atol=1e-8)


def compiles_as_one_graph(layer: Layer) -> None:
    """`torch.compile(fullgraph=True)` traces forward and backward, and later steps compile nothing."""
    for training in (True, False):
        assert_compiles(layer, training=training, backend="aot_eager")


def assert_compiles(layer: Layer, *, training: bool, backend: str) -> None:
    """Compare three steps of a compiled layer with the eager one; only the first step may compile."""
    torch.compiler.reset()
    norm = layer.build(act="relu", dtype=torch.float32).train(training)
    compiled = copy.deepcopy(norm)
    compiled.compile(fullgraph=True, backend=backend)
    for number in range(3):
        x, grad = (layer.input(4, 3, 5, seed=seed + number, dtype=torch.float32) for seed in (0, 5))
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = step(compiled, x, grad)
        want = step(norm, x, grad)
        for name, value in got.items():
            rtol, atol = (1e-4, 1e-5) if name == "y" else (1e-5, 1e-6) if name.startswith("buffer") else (1e-3, 1e-4)
            assert_same({name: value}, {name: want[name]}, rtol=rtol, atol=atol)


CHECKS: tuple[Check, ...] = (is_the_same_compiled, compiles_as_one_graph)
