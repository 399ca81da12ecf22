"""The streaming primitives for the CPU in C++ (`native.cpp`), compiled once per machine and called through ctypes.

On 2 cores the four passes of a layer with its ReLU take a fifth to a third of `nn.BatchNorm2d` + `nn.ReLU`, where what
inductor makes of the same formulas takes half as long or, on small images, longer. Float32, float64 and bfloat16; other
dtypes and activations are inductor's.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

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
    *,
    grad: Tensor | None = None,
    coefficients: Sequence[Tensor] = (),
    out: Sequence[Tensor],
) -> None:
    """One pass over `x`, all tensors contiguous.

    Args:
        x, grad: (N, C, L), or (N, L, C) with channel_dim -1.
        coefficients: mean, scale, shift, slope, offset as far as the pass reads them, (N, C) in the moments' dtype.
        out: one or two results.
    """
    library = _library()
    assert library is not None
    columns = channel_dim == -1
    samples, channels, length = (x.shape[0], x.shape[2], x.shape[1]) if columns else x.shape
    tensors = [grad, x, *coefficients, *[None] * (5 - len(coefficients)), *out, *[None] * (2 - len(out))]
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    library(what, DTYPES[x.dtype], ACTIVATIONS[act], columns, samples, channels, length, *pointers)


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
    facts = [SOURCE.read_text(), *FLAGS, version, _cpu()]
    path = cache_folder() / f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
            command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            built.replace(path)
    return path


def _cpu() -> str:
    """What -march=native means here: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def cache_folder() -> Path:
    """Where compiled code stays: `exnorm` in $XDG_CACHE_HOME, in ~/.cache, or else in the temporary folder."""
    for base in (os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache", tempfile.gettempdir()):
        folder = Path(base or "/nonexistent") / "exnorm"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise FileNotFoundError("no folder to keep compiled code in; set XDG_CACHE_HOME")
