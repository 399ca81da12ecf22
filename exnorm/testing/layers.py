"""What the checks share: layers with random values, inputs, and comparisons by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.norms import BatchScopeNorm, Norm

POSITIONS: tuple[tuple[int, ...], ...] = ((5,), (3, 5), (2, 3, 2))  # of inputs of 3, 4 and 5 dimensions


@dataclass(frozen=True)
class Layer:
    """A class of layers with its number of channels and its options."""

    norm: type[Norm]
    channels: int = 12
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> Norm:
        """Return a layer with random parameters and running statistics; `more` comes after the options."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            norm = self.norm(self.channels, dtype=dtype, **{**self.options, **more})
        randomize(norm, seed)
        return norm

    def input(self, samples: int = 4, *positions: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a random input (N, C, *positions)."""
        return draw(samples, self.channels, *positions, seed=seed, dtype=dtype)


Check = Callable[[Layer], None]


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Add noise of deviation 0.4 to all parameters, and make all running statistics random."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for parameter in module.parameters():
        parameter += 0.4 * noise(parameter)
    for name, buffer in module.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf == "running_mean":
            buffer.copy_(0.4 * noise(buffer))
        elif leaf == "running_var":
            buffer.copy_(0.5 + noise(buffer).abs())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random tensor with a mean and a scale of its own for every sample and channel."""
    generator = torch.Generator().manual_seed(seed + 1)
    coefficients = (*shape[:2], *(1,) * (len(shape) - 2))
    scale = 0.5 + torch.rand(coefficients, generator=generator, dtype=torch.float64)
    shift = torch.randn(coefficients, generator=generator, dtype=torch.float64)
    return (shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def gradients(y: Tensor, x: Tensor, norm: nn.Module, grad: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the input ("x") and of every parameter for a gradient of the output."""
    named = dict(norm.named_parameters())
    values = torch.autograd.grad(y, [x, *named.values()], grad, allow_unused=True)
    zeros = [torch.zeros_like(t) for t in (x, *named.values())]
    return {
        name: zero if value is None else value for name, value, zero in zip(["x", *named], values, zeros, strict=True)
    }


def buffers(norm: nn.Module) -> dict[str, Tensor]:
    """Return a copy of each buffer as "buffer <name>"."""
    return {f"buffer {name}": value.clone() for name, value in norm.named_buffers()}


def results(y: Tensor, x: Tensor, norm: nn.Module, grad: Tensor) -> dict[str, Tensor]:
    """Return the output "y", all gradients (of the input as "x"), and each buffer as "buffer <name>"."""
    return {"y": y.detach(), **gradients(y, x, norm, grad), **buffers(norm)}


def step(norm: Norm, x: Tensor, grad: Tensor, *others: Tensor) -> dict[str, Tensor]:
    """Return the `results` of a forward and a backward; `others` are further arguments of the layer."""
    x = x.detach().clone().requires_grad_()
    return results(norm(x, *others), x, norm, grad)


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], *, rtol: float, atol: float) -> None:
    """Equal names and close values, with the name in the message."""
    assert left.keys() == right.keys(), f"{sorted(left)} and {sorted(right)}"
    for name, value in left.items():
        torch.testing.assert_close(
            value,
            right[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a state dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def has_batch_scope(norm: Norm) -> bool:
    """Whether a layer normalizes a sample with the others of its replica."""
    return isinstance(norm, BatchScopeNorm) and norm.has_batch_scope()


def refusal(call: Callable[[], Any]) -> str | None:
    """Return the message of the ValueError that a call raises; None if it raises none."""
    try:
        call()
    except ValueError as problem:
        return str(problem)
    return None
