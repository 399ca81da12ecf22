"""`exnorm fold`: the time of inference before and after folding."""

import copy
import statistics

import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.diagnostics.bench import bench_device, device_name, interleaved, ratios

BATCH, ROUNDS = 8, 11


@torch.no_grad()
def measure(before: nn.Module, after: nn.Module, images: Tensor) -> str:
    """Return a sentence on the medians of alternating rounds, in each of which both models run once."""
    device = bench_device()
    batch = images[:BATCH].to(device)
    models = {name: copy.deepcopy(model).to(device) for name, model in (("before", before), ("after", after))}
    seconds = interleaved({name: lambda model=model: model(batch) for name, model in models.items()}, ROUNDS)
    old, new = (1000 * statistics.median(seconds[name]) for name in ("before", "after"))
    ratio = ratios(seconds["after"], seconds["before"])["ratio"]
    height, width = batch.shape[2:]
    return (
        f"Inference of {len(batch)} images of {height} x {width} px takes {old:.2f} ms before and {new:.2f} ms after, "
        f"{ratio:.2f} of the time (medians of {ROUNDS} alternating rounds; {device_name(device)}; back end "
        f"{ops.get_backend()})"
    )
