"""Exact evaluation: every image counts once, on any number of devices."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.data.loader import Loader, SeededImages, fixed_batches
from exnorm.data.splits import MaskedImages
from exnorm.engine.distributed import World
from exnorm.surgery.modes import evaluating
from exnorm.tasks.base import Task, Views, named, zero_sums

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision (fp32, bf16, fp16)."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def eval_loader(dataset: SeededImages, *, batch_size: int, workers: int, world: World) -> Loader:
    """Return a loader of this worker's share of a set: every world.size-th image, none twice.

    Images of different sizes come one by one, because test images are never padded.
    """
    several = not isinstance(dataset.images, MaskedImages) or dataset.images.same_size
    batches = fixed_batches(range(world.rank, len(dataset), world.size), batch_size if several else 1)
    return Loader(dataset, batches, workers=workers, device=world.device)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    task: Task,
    *,
    precision: str,
    world: World,
    views: Views,
) -> dict[str, float]:
    """Return the task's metrics over all workers' images, as `val/<name>`, in evaluation mode."""
    sums = zero_sums(task, world.device)
    rows: list[Tensor] = []
    with evaluating(model):
        for images, *targets in loader:
            with autocast(world.device, precision):
                output = task.predict(model, images, targets[0].shape[-2:], views)
            sums += task.sums(output, targets)
            if task.has_rows:
                rows.append(task.rows(output, targets).cpu())
    metrics = task.summarize(world.sum_(sums))
    if task.has_rows:
        metrics |= task.summarize_rows(_in_order(world.gather(rows)))
    return named(metrics, "val")


def _in_order(batches: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the rows of all workers in the order of the set, of which each worker has every len(batches)-th sample."""
    rows = torch.cat([batch for share in batches for batch in share])
    for rank, share in enumerate(batches):
        if share:
            rows[rank :: len(batches)] = torch.cat(list(share))
    return rows


def evaluate_all(
    model: nn.Module,
    loaders: Mapping[str, Loader],
    task: Task,
    *,
    precision: str,
    world: World,
    views: Views,
) -> dict[str, float]:
    """Return the metrics of the first set as `val/<name>`; with several sets, also those of each as `val/<set>/...`."""
    each = {
        name: evaluate(model, loader, task, precision=precision, world=world, views=views)
        for name, loader in loaders.items()
    }
    results = dict(next(iter(each.values())))
    if len(each) > 1:
        for name, metrics in each.items():
            results |= {key.replace("val/", f"val/{name}/", 1): value for key, value in metrics.items()}
    return results
