"""The lines that a run prints before its first step: device, precision, back end, cost, batch and duration."""

import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exnorm.engine.distributed import World
from exnorm.engine.evaluate import autocast
from exnorm.engine.learner import Learner
from exnorm.engine.progress import duration
from exnorm.engine.schedule import Schedule
from exnorm.models import count_parameters, gflops_per_image
from exnorm.norms.batch_scope import BatchScopeNorm, take_pending
from exnorm.runs.provenance import cpu_model
from exnorm.runs.subprocesses import available_cores

BUSY = 0.75  # the hint is printed from this load per core on, averaged over a minute
TRIAL_STEPS = 2  # the first one warms up


@dataclass(frozen=True)
class Facts:
    """The lines to print, and the same values for the record."""

    text: str
    record: dict[str, Any]


def describe_run(
    learner: Learner,
    config: Any,
    *,
    backend: str,
    schedule: Schedule,
    step_s: float,
    resumed: bool,
    world: World,
) -> Facts:
    """Return the description of the run that is about to start."""
    device = device_name(world.device)
    parameters = count_parameters(learner.model)
    gflops = gflops_per_image(learner.model, config.data.image_size)
    left = schedule.steps - learner.step
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    compiled = ", compiled" if config.trainer.compile else ", in a CUDA graph" if config.trainer.cuda_graph else ""
    about = "at most" if config.trainer.cuda_graph else "about"  # the measured step has no graph
    resume = f"resumed after step {learner.step}, " if resumed else ""
    size = config.data.image_size
    lines = [
        f"{config.model.name} with {config.norm.name} on {config.data.name}, seed {config.seed}",
        f"device {device}, {processes}; precision {learner.precision}; back end {backend}{compiled}",
        f"{parameters / 1e6:.3f} M parameters, {gflops:.3f} GFLOPs per {size} px image (multiply-adds counted once)",
        learner.plan.describe(),
        f"{schedule.steps} steps in {schedule.parts} {schedule.unit}s; {resume}{about} {duration(left * step_s)} plus "
        "validation",
    ]
    if world.device.type == "cpu":
        lines += busy(torch.get_num_threads(), os.getloadavg()[0], available_cores())
    record = {
        "device": device,
        "backend": backend,
        "parameters": parameters,
        "gflops_per_image": gflops,
    }
    return Facts("\n".join(lines), record | {"precision": learner.precision})


def busy(threads: int, load: float, cores: int) -> list[str]:
    """Return a hint if other programs keep the cores busy: threads then wait for each other at every layer."""
    if threads < 2 or load < BUSY * cores:
        return []
    return [f"this machine is busy (load {load:.1f} on {cores} cores). OMP_NUM_THREADS=1 can be several times faster"]


def seconds_per_step(learner: Learner, image_size: int) -> float:
    """Return the seconds of the forward and backward of one step, measured on noise; the model is not changed."""
    model, plan, device = learner.model, learner.plan, learner.world.device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    share = plan.total // plan.devices // plan.passes
    images = torch.randn(share, 3, image_size, image_size, device=device)
    elapsed = 0.0
    model.train()
    for _ in range(TRIAL_STEPS):
        start = time.monotonic()
        with autocast(device, learner.precision):
            output = model(images)
        parts: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        torch.stack([part.float().square().mean() for part in parts]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = (time.monotonic() - start) * plan.passes
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        if isinstance(module, BatchScopeNorm) and module.deferred:
            take_pending(module)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return elapsed


def device_name(device: torch.device) -> str:
    """Return the device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_model() or platform.machine()}, {torch.get_num_threads()} threads)"
