"""Exact evaluation: every image counts once, on any number of devices."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from exnorm.data.loader import Loader, SeededImages, fixed_batches
from exnorm.engine.distributed import World
from exnorm.tasks.classification import SUMS, Classification, summarize

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision (fp32, bf16, fp16)."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def eval_loader(dataset: SeededImages, *, batch_size: int, workers: int, world: World) -> Loader:
    """Return a loader of this worker's share of a set: every world.size-th image, none twice."""
    indices = range(world.rank, len(dataset), world.size)
    batches = fixed_batches(indices, batch_size)
    return Loader(dataset, batches, workers=workers, device=world.device)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    task: Classification,
    *,
    precision: str,
    world: World,
) -> dict[str, float]:
    """Return loss, top1 and top5 (in percent) over all workers' images, as `val/top1`; the model's mode is restored."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
    for images, labels, clean in loader:
        with autocast(world.device, precision):
            logits = model(images)
        sums += task.sums(logits, labels, clean)
    model.train(was_training)
    return summarize(world.sum_(sums), "val")


def evaluate_all(
    model: nn.Module,
    loaders: Mapping[str, Loader],
    task: Classification,
    *,
    precision: str,
    world: World,
) -> dict[str, float]:
    """Return the metrics of the first set as `val/top1`; with several sets, also those of each as `val/<set>/top1`."""
    each = {name: evaluate(model, loader, task, precision=precision, world=world) for name, loader in loaders.items()}
    results = dict(next(iter(each.values())))
    if len(each) > 1:
        for name, metrics in each.items():
            results |= {key.replace("val/", f"val/{name}/", 1): value for key, value in metrics.items()}
    return results
