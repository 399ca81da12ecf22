"""The streaming primitives for the CPU in C++ (`native.cpp`), compiled once per machine and called through ctypes.

On 2 cores the four passes of a layer with its ReLU take a fifth to a third of `nn.BatchNorm2d` + `nn.ReLU`, where what
inductor makes of the same formulas takes half as long or, on small images, longer. Float32, float64 and bfloat16; other
dtypes and activations are inductor's.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from exnorm.ops.layout import statistics_dtype
from exnorm.runs.cache import building_in, cache_folder, processor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "hardswish": 3}
MOMENTS, AFFINE, SUMS, GRADIENT = range(4)


def find_compiler() -> str | None:
    """The C++ compiler of this machine: $CXX, else g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def runs(x: Tensor, act: str | None) -> bool:
    """Whether the library serves this input with this activation."""
    return x.device.type == "cpu" and x.dtype in DTYPES and act in ACTIVATIONS and _library() is not None


def call(
    what: int,
    x: Tensor,
    channel_dim: int,
    act: str | None,
    coefficients: Sequence[Tensor],
    out: Tensor,
    out2: Tensor | None = None,
    *,
    other: Tensor | None = None,
) -> None:
    """One pass over `x`.

    Args:
        x: dense: contiguous, or channels last in memory with channel_dim 1.
        coefficients: mean, scale, shift, slope, offset as far as the pass reads them, (N, C) in the moments' dtype.
        out, out2: one or two results: contiguous moments or sums, or a tensor in the layout of `x`.
        other: in the layout of `x`: the gradient of the output; for AFFINE the residual.
    """
    library = _library()
    assert library is not None
    samples, channels = x.shape[0], x.shape[channel_dim]
    length = x.numel() // (samples * channels)
    columns = channel_dim == -1 or not x.is_contiguous()
    shape, dtype = (samples, channels), statistics_dtype(x)
    plain = [c.contiguous() for c in coefficients]  # kept: the pass reads them through their addresses
    assert all(c.shape == shape and c.dtype == dtype for c in plain), "memory of others would be read"
    pointers = [c.data_ptr() for c in plain] + [None] * (5 - len(plain))
    first = None if other is None else other.data_ptr()
    last = None if out2 is None else out2.data_ptr()
    facts = (DTYPES[x.dtype], ACTIVATIONS[act], columns, samples, channels, length)
    library(what, *facts, first, x.data_ptr(), *pointers, out.data_ptr(), last)


@contextlib.contextmanager
def compiled_meanwhile() -> Iterator[None]:
    """Compile the library, where it is missing, while something else is compiled; a failure shows at its first use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_built)
        yield


@functools.cache
def _library() -> Callable[..., None] | None:
    try:
        path = _built()
    except (OSError, subprocess.SubprocessError) as problem:
        text = getattr(problem, "stderr", None) or str(problem)
        warnings.warn(f"the CPU kernels could not be compiled; inductor's are used: {text.strip()[:300]}", stacklevel=2)
        return None
    function = ctypes.CDLL(str(path)).exnorm_pass
    function.restype = None
    function.argtypes = [ctypes.c_int] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 9
    return function  # type: ignore[no-any-return]


def _built() -> Path:
    """The compiled library, from the cache if this machine has built this source before."""
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++ or clang++; or set CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    facts = [SOURCE.read_text(), *FLAGS, version, processor()]
    path = cache_folder() / f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with building_in(path) as built:
            openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
            command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return path
