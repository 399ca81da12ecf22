"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import varied

TESTS = Path(__file__).parent
pytest.importorskip("triton")

TOLERANCE = {"float32": 1e-4, "bfloat16": 1.5e-2, "float16": 3e-3}


def run_apart(*arguments: str) -> list[dict[str, Any]]:
    """The rows that a script of the tests prints, from a process of its own."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("seed", "layers"), [(0, 2), pytest.param(1, 4, marks=pytest.mark.slow), *varied([(1, 10), (2, 10)])]
)
def test_random_layers_are_what_float64_says(seed: int, layers: int) -> None:
    """Any norm, options, shape, layout, dtype, activation, residual, replicas and mode; also running statistics.

    Where rounding decides, as in the gradient of IN over a single position, eager layers show how far it goes.
    """
    rows = run_apart(str(TESTS / "triton_interpreted.py"), str(seed), str(layers))
    wrong = [row for row in rows if not row["error"] <= max(TOLERANCE[row["case"]["dtype"]], 2 * row["eager"])]
    assert rows and not wrong


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_to_wide_loads(capability: int) -> None:
    """For an A100 and an H100: all registers suffice, and big tensors in bfloat16 move 16 bytes at a time."""
    rows = run_apart(str(TESTS / "triton_compiled.py"), str(capability))
    assert len(rows) > 20
    assert not [row for row in rows if row["spilled_bytes"]]
    assert not [row for row in rows if row["narrow_loads"]]
    assert not [row for row in rows if row["instructions_per_element"] > row["allowed"]]


def test_a_launch_calls_a_compiled_kernel_as_triton_does() -> None:
    """All but Triton's hooks: `CompiledKernel.run` is not documented, so a change in Triton is to be noticed here."""
    from triton.compiler.compiler import CompiledKernel

    from exnorm.ops.triton.launch import bound

    calls: list[tuple[object, ...]] = []
    kernel = SimpleNamespace(
        run=lambda *args: calls.append(args),
        function="function",
        packed_metadata="packed",
        launch_metadata=lambda *args: None,
        _init_handles=lambda: None,
    )
    grid, arguments, hooks = (3, 1, 1), (4096, 0.5, 7), slice(7, 9)
    CompiledKernel.__getitem__(kernel, grid)(*arguments, stream=11)
    bound(kernel, grid, 2, {2: 11}.__getitem__)(*arguments)
    theirs, ours = map(list, calls)
    theirs[hooks] = [None, None]
    assert ours == theirs


@pytest.mark.slow
def test_a_compiled_layer_is_one_operator_with_the_same_results() -> None:
    """Bit-equal to the layer without torch.compile, running statistics included."""
    rows = run_apart(str(TESTS / "triton_operators.py"), "0", "2")
    assert len(rows) == 12
    assert not [row for row in rows if row["differ"]]
    recorded = {"bn": ["exnorm.record.default"], "sn": ["exnorm.record.default"], "en": ["exnorm.record.default"]}
    for row in rows:
        between = recorded.get(row["case"]["norm"], []) if row["case"]["training"] else []
        assert row["operators"] == ["exnorm.layer.default", *between, "exnorm.layer_backward.default"], row


@pytest.mark.slow
def test_a_compiled_layer_may_get_one_tensor_twice() -> None:
    """As input and residual, or as two parameters: torch 2.11 then lost a gradient, 2.15 refused it."""
    rows = run_apart(str(TESTS / "triton_operators.py"), "twice")
    assert len(rows) == 4
    assert not [row for row in rows if row["error"] > 1e-4]


@pytest.mark.slow
def test_compiled_models_train_as_without_the_compiler() -> None:
    """Steps of several input sizes with torch's own compiler, then outputs without gradients; also frozen layers."""
    rows = run_apart(str(TESTS / "triton_operators.py"), "trainings")
    assert len(rows) == 3
    assert not [row for row in rows if max(row["errors"].values()) > 1e-5]


@pytest.mark.slow
def test_the_operator_leaves_to_the_formula_what_it_cannot_do() -> None:
    """Weights with strides, of which kernels read the addresses; torch.func; programs for other machines."""
    rows = run_apart(str(TESTS / "triton_operators.py"), "formula")
    assert len(rows) == 4
    assert not [row for row in rows if row["exported"] or max(row["errors"].values()) > 1e-4]
