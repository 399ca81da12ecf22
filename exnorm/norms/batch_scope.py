"""Normalizers that use BN's scope: batch statistics per replica, running statistics, and their bookkeeping.

Outside the engine such a layer behaves like `torch.nn.BatchNorm2d`: each training forward updates the running
statistics. After `configure_scope`, a forward only adds its statistics to a pending sum. `commit_running_stats`, called
once per optimizer step, then updates the running statistics once. It uses the plain mean of each replica's statistics
over all replicas, passes and processes.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.norms.base import Norm, check_options
from exnorm.norms.statistics import (
    Moments,
    Statistics,
    replica_statistics,
    replica_to_sample,
)


class BatchScopeNorm(Norm):
    """A norm with running statistics of BN's scope.

    Args (beyond `Norm`'s):
        momentum: running = (1 - momentum) * running + momentum * batch, as in torch; None for the cumulative mean.
        sync: BN's scope is the complete batch, over all replicas and processes.
        track_running_stats: if False, batch statistics are used in evaluation too. If the attribute is set to False
            later, the running statistics stay as they are.

    Buffers: running_mean, running_var (C,), num_batches_tracked. The pending sums are not in the state dict.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    pending_mean: Tensor
    pending_var: Tensor
    pending_count: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        sync: bool = False,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        check_options(type(self).__name__, momentum=momentum)
        self.momentum = momentum
        self.sync = sync
        self.track_running_stats = track_running_stats
        self.deferred = False
        # Statistics stay in float32 where the parameters are in half precision.
        double = (dtype or torch.get_default_dtype()) == torch.float64
        factory: dict[str, Any] = {"device": device, "dtype": torch.float64 if double else torch.float32}
        buffers = {
            "running_mean": torch.zeros(num_features, **factory),
            "running_var": torch.ones(num_features, **factory),
            "num_batches_tracked": torch.zeros((), dtype=torch.long, device=device),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value if track_running_stats else None)
        if track_running_stats:
            self.register_buffer("pending_mean", torch.zeros(num_features, **factory), persistent=False)
            self.register_buffer("pending_var", torch.zeros(num_features, **factory), persistent=False)
            self.register_buffer("pending_count", torch.zeros((), **factory), persistent=False)

    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("running_mean", "running_var", "pending_mean", "pending_var")
        return {**super().channel_shapes(), **dict.fromkeys(names, (self.num_features,))}

    def reset_parameters(self) -> None:
        """Reset all values to those at construction: parameters, running statistics and pending sums."""
        super().reset_parameters()
        self.reset_running_stats()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1, and num_batches_tracked and the pending sums to 0."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            for counted in (self.num_batches_tracked, self.pending_mean, self.pending_var, self.pending_count):
                counted.zero_()

    def has_batch_scope(self) -> bool:
        """Whether the layer normalizes over BN's scope; a mixture without BN does not."""
        return True

    def uses_batch_statistics(self) -> bool:
        """Whether BN's statistics are those of the current batch, not the running ones."""
        return self.has_batch_scope() and (self.training or self.running_mean is None)

    def stored_variance(self, var_RC: Tensor, count: Any) -> Tensor:
        """Return the variance for `running_var`, from `count` values of a channel: here the biased one."""
        return var_RC

    def batch_statistics(self, moments: Moments) -> Statistics:
        """Return BN's mean and variance for each sample, (N, C) or (1, C). In training, record them."""
        if self.running_mean is not None and self.running_var is not None and not self.training:
            like = moments.mean_NC
            return Statistics(
                self.running_mean.to(like.dtype)[None],
                self.running_var.to(like.dtype)[None],
            )
        mean_RC, var_RC, count = replica_statistics(moments)
        tracked = self.track_running_stats and self.running_mean is not None
        if self.training and moments.record and tracked:
            self._record(
                mean_RC.detach().mean(0),
                self.stored_variance(var_RC.detach(), count).mean(0),
            )
        return Statistics(replica_to_sample(mean_RC, moments), replica_to_sample(var_RC, moments))

    def scope(self) -> tuple[int, Any]:
        # Outside the engine nothing configures the scope; `sync` means all processes there, too.
        return (1, world_group()) if self.sync and not self.deferred else super().scope()

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if not self.uses_batch_statistics():
            return
        samples, (replicas, group) = x.shape[0], self.scope()
        if samples % replicas:
            raise UserError(f"{samples} samples do not split into {replicas} replicas; give a multiple of {replicas}")
        if self.training and samples == replicas and x[0].numel() == self.num_features and group is None:
            others = ", or normalizers=[in,ln]" if hasattr(self, "normalizers") else ""
            raise UserError(
                f"{type(self).__name__} in training needs more than 1 value per channel in BN's scope, which is "
                f"1 sample of 1 position here; use a larger batch or image, or sync=True with several processes{others}"
            )

    def _record(self, mean_C: Tensor, var_C: Tensor) -> None:
        if self.deferred:
            self.pending_mean += mean_C
            self.pending_var += var_C
            self.pending_count += 1
        else:
            self.update_running_stats(mean_C, var_C)

    @torch.no_grad()
    def update_running_stats(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Update the running statistics once, with the given ones."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        if self.momentum is None:
            weight = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        else:
            weight = self.momentum
        self.running_mean += weight * (mean_C.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += weight * (var_C.to(self.running_var.dtype) - self.running_var)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, momentum={self.momentum}"
        return text + (", sync=True" if self.sync else "")


def world_group() -> Any:
    """The process group of all processes, or None if there is only this one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def batch_scope_norms(model: nn.Module) -> list[BatchScopeNorm]:
    """The layers of a model that use BN's scope, in the order of `modules()`."""
    return [module for module in model.modules() if isinstance(module, BatchScopeNorm)]


def configure_scope(model: nn.Module, *, replicas: int = 1, group: Any = None) -> None:
    """Set BN's scope of every layer and defer running statistics to `commit_running_stats`.

    The first call sets the pending sums to 0.

    Args:
        replicas: replicas in one forward of this device, N / replicas consecutive samples each.
        group: the process group that one replica spans; None if it lies on this device.

    Layers with `sync` ignore both: their scope is the complete batch of all processes.
    """
    world = world_group()
    for module in batch_scope_norms(model):
        if module.running_mean is not None and not module.deferred:
            # A model that was built on the meta device (`to_empty`, `from_pretrained` of transformers) has arbitrary
            # values here: no state dict holds the pending sums.
            for pending in (module.pending_mean, module.pending_var, module.pending_count):
                pending.zero_()
        module.deferred = module.running_mean is not None
        module.replicas, module.group = (1, world) if module.sync else (replicas, group)


def take_pending(module: BatchScopeNorm) -> tuple[Tensor, Tensor]:
    """Return the mean of a layer's pending statistics and clear them; return the running ones if it did not run."""
    assert module.running_mean is not None and module.running_var is not None
    count = module.pending_count.clamp(min=1)
    ran = module.pending_count > 0
    mean_C = torch.where(ran, module.pending_mean / count, module.running_mean)
    var_C = torch.where(ran, module.pending_var / count, module.running_var)
    for pending in (module.pending_mean, module.pending_var, module.pending_count):
        pending.zero_()
    return mean_C, var_C


@torch.no_grad()
def commit_running_stats(model: nn.Module) -> None:
    """Update the running statistics once, with the mean over replicas, passes and processes.

    Call it after each optimizer step. Where a layer did not run, its running statistics take the place of the pending
    ones. All layers are updated together: on a GPU, the number of launches does not grow with the number of layers (up
    to torch's limit per foreach kernel).
    """
    kinds: dict[Any, list[BatchScopeNorm]] = {}
    for module in batch_scope_norms(model):
        if module.deferred and not module.frozen and module.running_mean is not None:
            kinds.setdefault((module.running_mean.dtype, module.running_mean.device), []).append(module)
    for modules in kinds.values():
        _commit(modules)


def _commit(modules: list[BatchScopeNorm]) -> None:
    """`commit_running_stats` for layers of one dtype on one device."""
    running = [_buffer(module, name) for name in ("running_mean", "running_var") for module in modules]
    pending = [buffer for name in ("pending_mean", "pending_var") for buffer in (getattr(m, name) for m in modules)]
    counts = [module.pending_count for module in modules]
    tracked = [_buffer(module, "num_batches_tracked") for module in modules]
    layer_of = _layer_of_channel(tuple(module.num_features for module in modules), running[0].device)
    count = torch.stack(counts)[layer_of]
    before = torch.cat(running)
    statistics = torch.where(count > 0, torch.cat(pending) / count.clamp(min=1), before)
    if world_group() is not None:
        dist.all_reduce(statistics)
        statistics /= dist.get_world_size()
    torch._foreach_add_(tracked, 1)
    weight = torch.stack([_weight(module, before) for module in modules])[layer_of]
    after = before + weight * (statistics - before)
    torch._foreach_copy_(running, after.split([buffer.numel() for buffer in running]))
    torch._foreach_zero_([*pending, *counts])


def _buffer(module: BatchScopeNorm, name: str) -> Tensor:
    buffer = getattr(module, name)
    assert buffer is not None
    return buffer


def _weight(module: BatchScopeNorm, like: Tensor) -> Tensor:
    """Return the weight of the new statistics. Call it after `num_batches_tracked` has been increased."""
    if module.momentum is None:
        return 1 / _buffer(module, "num_batches_tracked").to(like.dtype)
    return _constant(module.momentum, like.dtype, like.device)


@functools.cache  # never dropped: a CUDA graph may read it
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor on the device; it is copied there once, not in every step."""
    return torch.tensor(value, dtype=dtype, device=device)


@functools.cache
def _layer_of_channel(channels: tuple[int, ...], device: torch.device) -> Tensor:
    """The index of the layer that each channel belongs to, for all means and then all variances."""
    layers = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))
    return torch.cat((layers, layers)).to(device)
