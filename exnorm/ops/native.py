"""The streaming primitives for the CPU in C++ (`native.cpp`), compiled once per machine and called through ctypes.

On 2 cores, the four passes of a layer with its ReLU take a fifth to a third of the time of `nn.BatchNorm2d` +
`nn.ReLU`. Inductor's code for the same formulas takes half of that time, and more on small images. The library supports
float32, float64 and bfloat16. Inductor's code runs for other dtypes and activations.
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
    """Return the path of the C++ compiler: $CXX, else g++ or clang++; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def runs(x: Tensor, act: str | None) -> bool:
    """Whether the library supports this input with this activation."""
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
    """Run one pass over `x`, and write its results into `out` and `out2`.

    Args:
        what: the pass: MOMENTS, AFFINE, SUMS or GRADIENT.
        x: a dense tensor: contiguous, or channels last in memory with channel_dim 1.
        coefficients: those of mean, scale, shift, slope, offset that the pass reads, (N, C) in the moments' dtype.
        out, out2: one or two results: contiguous moments or sums, or a tensor in the layout of `x`.
        other: the gradient of the output, or for AFFINE the residual, in the layout of `x`.
    """
    library = _library()
    assert library is not None
    samples, channels = x.shape[0], x.shape[channel_dim]
    length = x.numel() // (samples * channels)
    columns = channel_dim == -1 or not x.is_contiguous()
    shape, dtype = (samples, channels), statistics_dtype(x)
    plain = [c.contiguous() for c in coefficients]  # a reference: the pass reads them by their addresses
    assert all(c.shape == shape and c.dtype == dtype for c in plain), "the pass would read outside of these tensors"
    pointers = [c.data_ptr() for c in plain] + [None] * (5 - len(plain))
    first = None if other is None else other.data_ptr()
    last = None if out2 is None else out2.data_ptr()
    facts = (DTYPES[x.dtype], ACTIVATIONS[act], columns, samples, channels, length)
    library(what, *facts, first, x.data_ptr(), *pointers, out.data_ptr(), last)


@contextlib.contextmanager
def compiled_meanwhile() -> Iterator[None]:
    """Compile a missing library in a second thread while the body runs. A failure shows at the library's first use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_built)
        yield


@functools.cache
def _library() -> Callable[..., None] | None:
    try:
        path = _built()
    except (OSError, subprocess.SubprocessError) as problem:
        text = getattr(problem, "stderr", None) or str(problem)
        warnings.warn(
            f"the CPU kernels could not be compiled, and slower code of inductor runs instead: {text.strip()[:300]}",
            stacklevel=2,
        )
        return None
    function = ctypes.CDLL(str(path)).exnorm_pass
    function.restype = None
    function.argtypes = [ctypes.c_int] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 9
    return function  # type: ignore[no-any-return]


def _built() -> Path:
    """Return the path of the compiled library. Compile it if the cache has none of this source for this machine."""
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found; install g++ or clang++, or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    facts = [SOURCE.read_text(), *FLAGS, version, processor()]
    path = cache_folder() / f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with building_in(path) as built:
            openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
            command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return path
