"""Launch a kernel in a few microseconds of CPU time.

At each launch, Triton checks every argument (its type, whether 16 divides it, whether it is 1) to find the matching
compiled kernel. That takes about 1 microsecond per argument, and a layer has 200 arguments. Here all numbers of a
launch are fixed, so only the addresses are checked. The compiled kernel's `run` is called as Triton itself calls it,
but without its hooks at each launch; so its profiler Proton sees the first launch of a kernel alone.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


class Launch:
    """A kernel with its grid and all its arguments except tensors and floats.

    Args:
        kernel: its parameters are pointers, then floats, then integers, then constants, in this order.
        programs: the size of the grid, which has one axis.
        integers: the values of the integers.
        constants: the constants by name, and `num_warps`. They are passed in the order of the signature.
    """

    def __init__(self, kernel: Any, programs: int, integers: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.integers, self.constants = integers, constants
        self._rest = (*integers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._run: dict[int, Callable[..., None]] = {}  # by device; for addresses that 16 divides

    def __call__(self, *tensors: Tensor, floats: tuple[float, ...] = ()) -> None:
        """Run the kernel on the current stream of the tensors' device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        device = tensors[0].get_device()
        if device >= 0 and _several_devices() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors, floats=floats)
        floats = tuple(map(float, floats))  # Triton would compile an integer 1 as a constant
        aligned = not functools.reduce(operator.or_, addresses) & 15
        run = self._run.get(device)
        if run is not None and aligned:
            run(*addresses, *floats, *self._rest)
            return None
        compiled = self.kernel[self.grid](*tensors, *floats, *self.integers, **self.constants)
        if aligned and not INTERPRETED:
            self._run[device] = bound(compiled, self.grid, device, triton.runtime.driver.active.get_current_stream)
        return None


def bound(
    compiled: Any, grid: tuple[int, int, int], device: int, stream_of: Callable[[int], int]
) -> Callable[..., None]:
    """Return a function of a compiled kernel's arguments that launches it on the device's current stream."""

    def launch(*args: Any) -> None:
        stream, packed = stream_of(device), compiled.packed_metadata
        compiled.run(*grid, stream, compiled.function, packed, None, None, None, *args)

    return launch


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1
