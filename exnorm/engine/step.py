"""One optimizer step. On a GPU its forward and backward passes can be replayed from a CUDA graph.

At 2 to 32 images per GPU the time of a step is that of Python and of launching kernels, one by one. A graph is launched
at once. It reads its images from, and leaves its gradients in, tensors that stay the same from step to step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exnorm.config.errors import UserError, first_line
from exnorm.data.loader import mixed_seed
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import autocast
from exnorm.engine.learner import NO_BAD_STEP, Learner
from exnorm.norms import commit_running_stats
from exnorm.norms.batch_scope import batch_scope_norms

Batch = Sequence[Tensor]  # images and their targets
Passes = Callable[[Learner, Batch], tuple[Tensor, Tensor]]
UNCAPTURED = 3  # steps before the capture: they compile kernels, choose algorithms and allocate workspaces


def train_step(learner: Learner, batch: Batch, *, seed: int, passes: Passes) -> Tensor:
    """Do one optimizer step over this worker's share of a global batch; return the share's metric sums.

    Args:
        passes: `run_passes`, or a `GraphedPasses`.
    """
    torch.manual_seed(mixed_seed(seed, learner.step, learner.world.rank))  # dropout; no generator state to restore
    batch_sums, finite = passes(learner, _mixed(learner, batch, seed=seed))
    learner.bad_step = torch.minimum(learner.bad_step, torch.where(finite, NO_BAD_STEP, learner.step + 1))
    if learner.clip_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.model.parameters(), learner.clip_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if not isinstance(passes, GraphedPasses):
        learner.optimizer.zero_grad(set_to_none=True)
    commit_running_stats(learner.model)
    if learner.ema is not None:
        learner.ema.update(learner.step + 1)
    learner.sums += batch_sums
    return batch_sums


def _mixed(learner: Learner, batch: Batch, *, seed: int) -> Batch:
    """Return what the task makes of a batch. The step's replicas have the same seeds on any devices."""
    images, *targets = batch
    count = learner.plan.replicas_per_device
    replicas = range(learner.world.rank * count, (learner.world.rank + 1) * count)
    return learner.task.mixed(images, targets, seeds=(mixed_seed(seed, learner.step, replica) for replica in replicas))


def run_passes(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the forward and the backward of each pass, which add up gradients.

    Returns:
        The metric sums of the batch, and whether the loss of each pass is finite.
    """
    plan, count = learner.plan, learner.plan.passes
    batch_sums = torch.zeros_like(learner.sums)
    finite = torch.ones((), dtype=torch.bool, device=batch_sums.device)
    for index, (images, *targets) in enumerate(zip(*[tensor.chunk(count) for tensor in batch], strict=True)):
        exchanges = learner.ddp is None or index == count - 1
        with nullcontext() if exchanges else learner.ddp.no_sync():  # type: ignore[union-attr]
            with autocast(learner.world.device, learner.precision):
                output = learner.net(images)
            loss = learner.task.loss(output, targets, replicas=plan.replicas_per_pass, group=learner.group) / count
            learner.scaler.scale(loss).backward()
        finite = finite & loss.detach().isfinite()
        batch_sums += learner.task.sums(output, targets)
    return batch_sums, finite


class GraphedPasses:
    """`run_passes`, replayed from a CUDA graph after a few steps; all batches have the same shapes.

    Gradients stay allocated: a replay overwrites them. So do all activations: validation needs memory of its own. With
    several processes the gradients are averaged after the replay, because a graph would have to hold the exchange.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.batch: list[Tensor] = []
        self.results: tuple[Tensor, Tensor] | None = None

    def __call__(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `run_passes`."""
        self.steps += 1
        if self.steps <= UNCAPTURED:
            results = self._run_aside(learner, batch)
        else:
            if self.results is None:
                self._capture(learner, batch)
            for static, given in zip(self.batch, batch, strict=True):
                static.copy_(given, non_blocking=True)
            self.graph.replay()
            assert self.results is not None
            results = self.results[0].clone(), self.results[1]
        average_gradients(learner.model, learner.world)
        return results

    def _run_aside(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run on the stream of the capture, which compiles kernels and makes the workspaces of this stream."""
        learner.optimizer.zero_grad(set_to_none=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = run_passes(learner, batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, learner: Learner, batch: Batch) -> None:
        self.batch = [tensor.clone() for tensor in batch]
        learner.optimizer.zero_grad(set_to_none=True)
        try:
            # Only calls of this thread are captured: the loader's thread pins memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = run_passes(learner, self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            raise UserError(
                f"this model cannot be captured in a CUDA graph ({first_line(problem)}). Leave trainer.cuda_graph out"
            ) from problem


def average_gradients(model: nn.Module, world: World) -> None:
    """Replace each gradient by its mean over all processes, with one exchange."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / world.size
    dist.all_reduce(flat)
    means = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [mean.view(g.shape) for mean, g in zip(means, gradients, strict=True)])


def choose_passes(config: Any, learner: Learner) -> Passes:
    """Choose how passes run, by `trainer.cuda_graph`.

    Raises:
        UserError: a layer exchanges statistics between GPUs, which a graph cannot hold.
    """
    if not config.trainer.cuda_graph:
        return run_passes
    if any(norm.has_batch_scope() and norm.scope()[1] is not None for norm in batch_scope_norms(learner.model)):
        raise UserError(
            f"trainer.cuda_graph=true cannot capture statistics that GPUs exchange: BN's scope of {learner.plan.scope} "
            "samples spans several. Use fewer trainer.devices, or leave trainer.cuda_graph out"
        )
    return GraphedPasses()
