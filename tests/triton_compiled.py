"""Compile every Triton kernel for a GPU that need not be there, and read what the machine code does: a row per kernel.

    python tests/triton_compiled.py CAPABILITY        80 is an A100, 90 an H100

The tools are those in Triton's own wheel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default that Triton 3.9 warns about

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from exnorm.norms.fused import batch_norm, exemplar_norm, group_norm, scope, switch_norm
from exnorm.ops.triton import sums as sums_kernels
from exnorm.ops.triton.affine import affine
from exnorm.ops.triton.gradient import gradient
from exnorm.ops.triton.moments import merge, moments
from exnorm.ops.triton.tiles import Tile, merge_tile, reduction_tile, streaming_tile

CUOBJDUMP = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
BIG = ("x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "gated_ptr", "dx_ptr")
FLOATS = ("eps", "momentum", "unbiased")
SCOPE = {key: value for key, value in scope.BLOCK.items() if key != "num_warps"}
# Instructions in the machine code for each element of a thread's tile. A reduction has its loop, and what follows it.
STREAMING, REDUCTION = 28.0, 80.0


def passes() -> list[tuple[Any, dict[str, Any], Tile]]:
    """Each pass in the tiles and with the options of ResNet-50."""
    found = []
    for length, channels in ((12544, 64), (3136, 256), (49, 2048)):
        reduce, stream = (tile(length, channels, rows=False) for tile in (reduction_tile, streaming_tile))
        cases: list[tuple[Any, dict[str, Any], Tile]] = [
            (moments, {"FINAL": length == 49}, reduce),
            (affine, {"RESIDUAL": False, "ACT": "relu"}, stream),
            (affine, {"RESIDUAL": True, "ACT": "relu"}, stream),
            (sums_kernels.sums, {"GATE": False, "ACT": "relu"}, reduce),
            (sums_kernels.sums, {"GATE": True, "ACT": "none"}, reduce),
            (gradient, {"CONSTANT": False, "ACT": "relu"}, stream),
            (gradient, {"CONSTANT": False, "ACT": "none"}, stream),
        ]
        layout = {"ROWS": False, "WIDE": False}
        found += [(k, {**o, **layout, "BL": t.positions, "BC": t.channels}, t) for k, o, t in cases]
    return found


def coefficients() -> list[tuple[Any, dict[str, Any], int]]:
    """The kernels between the passes."""
    affine_options = {"AFFINE": True}
    branch = {"TANH": True, "BR": 16, "BH": 256}
    small, large = {**branch, "BZ": 4, "BC": 64}, {**branch, "BZ": 128, "BC": 2048}
    return [
        *(
            (kernel, {"BP": tile.positions, "BC": tile.channels}, tile.warps)
            for kernel in (merge, sums_kernels.merge)
            for tile in map(merge_tile, (2, 132))
        ),
        *((scope.batch_statistics, {"MODE": mode, **SCOPE}, 4) for mode in (0, 1, 2)),
        *((batch_norm.forward_kernel, {"MODE": mode, **affine_options, **SCOPE}, 4) for mode in (1, 2)),
        (batch_norm.backward_kernel, {**affine_options, **SCOPE}, 4),
        (group_norm.statistics, {**affine_options, "BG": 32, "BD": 32}, 4),
        (group_norm.input, {**affine_options, "BG": 32, "BD": 32}, 4),
        (group_norm.parameters, SCOPE, 4),
        (switch_norm.forward_kernel, {**affine_options, "BC": 2048}, 4),
        (switch_norm.samples_kernel, {**affine_options, "BC": 2048}, 4),
        (switch_norm.channels_kernel, {**affine_options, "BATCH": True, **SCOPE}, 4),
        *((kernel, small, 4) for kernel in (exemplar_norm.forward_kernel, exemplar_norm.samples_kernel)),
        *((kernel, large, 8) for kernel in (exemplar_norm.forward_kernel, exemplar_norm.samples_kernel)),
        (exemplar_norm.gradients_kernel, {"BATCH": True, **SCOPE}, 4),
    ]


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> tuple[str, str]:
    """What cuobjdump says of the resources, and the machine code."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            counts = name == "count_ptr" and constants.get("MODE") == scope.RUNNING
            signature[name] = "*bf16" if name in BIG else "*i64" if counts else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name == "channels":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        dumps = [
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    return dumps[0], dumps[1]


def row(kernel: Any, constants: dict[str, Any], warps: int, capability: int, tile: Tile | None) -> dict[str, Any]:
    """One kernel: its registers, what it spills, narrow accesses of big tensors, instructions per element."""
    usage, code = compiled(kernel, constants, warps, capability)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.M))
    narrow = re.findall(r"\b(?:LDG|STG)\.E\.U16\b", code) if tile is not None else []
    elements = tile.positions * tile.channels / (32 * warps) if tile is not None else 1.0  # of a thread
    return {
        "kernel": kernel.__name__,
        "constants": constants,
        "registers": numbers["REG"],
        "spilled_bytes": numbers["LOCAL"] + numbers["STACK"],
        "narrow_loads": len(narrow),
        "instructions_per_element": instructions / elements if tile is not None else 0.0,
        "allowed": REDUCTION if "FINAL" in constants or "GATE" in constants else STREAMING,
    }


def main() -> None:
    capability = int(sys.argv[1])
    for kernel, constants, tile in passes():
        print(json.dumps(row(kernel, constants, tile.warps, capability, tile)), flush=True)
    for kernel, constants, warps in coefficients():
        print(json.dumps(row(kernel, constants, warps, capability, None)), flush=True)


if __name__ == "__main__":
    main()
