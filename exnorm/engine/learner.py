"""The model in training, and functions to build, check, save and restore it. `exnorm.engine.step` trains a step."""

import inspect
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exnorm.config.errors import UserError
from exnorm.data.loader import mixed_seed
from exnorm.engine import checkpoint
from exnorm.engine.batch import BatchPlan, parse_batch
from exnorm.engine.calibrate import Calibrated
from exnorm.engine.distributed import World, replica_group
from exnorm.engine.ema import AveragedModel
from exnorm.models import build_network, load_ratios, load_weights
from exnorm.norms import configure_scope
from exnorm.optim import build_optimizer
from exnorm.runs.folder import NOT_FINITE, RunFolder
from exnorm.tasks.base import Task, zero_sums

NO_BAD_STEP = 2**62
# No forward of DDP copies the first worker's buffers to the others. torch 2.15 warns about the earlier name.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS: Any = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


@dataclass
class Learner:
    """The bare model, the model as it is called (DDP, compiled), the optimizer, the scaler and the progress."""

    model: nn.Module
    net: nn.Module
    ddp: DistributedDataParallel | None  # inside `net`; None with one process, or where a CUDA graph runs the passes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    task: Task
    plan: BatchPlan
    precision: str
    world: World
    group: Any  # the processes that share this worker's replica; None if it has complete replicas
    sums: Tensor
    bad_step: Tensor  # the first step with a non-finite loss; huge while there is none
    step: int = 0  # optimizer steps done
    epoch: int = 0  # validations done
    train_s: float = 0.0  # seconds of training, until `clock`
    clock: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    calibrated: Calibrated | None = None
    clip_norm: float | None = None  # the largest norm of the gradients of a step
    ema: AveragedModel | None = None  # the average of the weights

    @property
    def validated(self) -> nn.Module:
        """The model that is validated: the one with averaged weights, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def read_clock(self) -> float:
        """Add the seconds since the clock was set or last read to the training time; return that of the run."""
        now = time.monotonic()
        self.train_s, self.clock = self.train_s + now - self.clock, now
        return self.train_s


def build_learner(config: Any, plan: BatchPlan, world: World, task: Task) -> Learner:
    """Return model, optimizer and scaler of a new run, on this worker's device."""
    torch.manual_seed(mixed_seed(config.seed))
    model = build_network(task.network, config.model, config.norm)
    if config.model.init_from is not None:
        source = config.model.init_from
        for note in [*load_weights(model, checkpoint.read_weights(source), source=source), *batch_advice(config)]:
            if world.is_first:
                print(f"model.init_from: {note}", flush=True)
    if config.model.init_ratios_from is not None:
        source = config.model.init_ratios_from
        load_ratios(model, checkpoint.read_weights(source), source=source)
    memory_format = torch.channels_last if config.trainer.channels_last else torch.contiguous_format
    model = model.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
    group = replica_group(world, plan.span)
    configure_scope(model, replicas=plan.replicas_per_pass, group=group)
    ddp = None
    if world.size > 1 and not config.trainer.cuda_graph:
        device_ids = [world.device] if world.device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=device_ids, **OWN_BUFFERS)
    net: nn.Module = model if ddp is None else ddp
    if config.trainer.compile:
        # Around DDP: torch.compile then splits the backward where DDP starts to exchange gradients.
        net = torch.compile(net)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    return Learner(
        model=model,
        net=net,
        ddp=ddp,
        optimizer=build_optimizer(model, config.optim, total_batch=plan.total),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.trainer.precision == "fp16"),
        task=task,
        plan=plan,
        precision=config.trainer.precision,
        world=world,
        group=group,
        sums=zero_sums(task, world.device),
        bad_step=torch.tensor(NO_BAD_STEP, device=world.device),
        clip_norm=config.optim.clip_norm,
        ema=None if config.trainer.ema is None else AveragedModel(model, decay=config.trainer.ema),
    )


def batch_advice(config: Any) -> list[str]:
    """Return a line if the run in `model.init_from` had another number of samples in BN's scope than this one.

    Source: P. Luo et al., "Switchable Normalization", TPAMI 2019, on transfer to segmentation.
    """
    source = RunFolder(Path(config.model.init_from).expanduser())
    if not source.config_file.is_file():
        return []
    before = source.read_config()["batch"]
    if parse_batch(before)[1] == parse_batch(config.batch)[1]:
        return []
    return [
        f"the run was trained with batch={before}, and this one has batch={config.batch}. SN's authors advise "
        "comparable batch settings in pretraining and finetuning"
    ]


def check(folder: RunFolder, learner: Learner, request: int) -> int:
    """Share a request to stop or a non-finite loss of one worker with all workers; return the request.

    Raises:
        UserError: the loss was not finite. The last checkpoint is from before that.
    """
    request, negated = learner.world.largest(request, -int(learner.bad_step))
    if -negated != NO_BAD_STEP:
        step = folder.last_step()
        kept = "" if step is None else f"; the checkpoint after step {step} is kept"
        raise UserError(
            f"{NOT_FINITE} {-negated} (epoch {learner.epoch + 1}){kept}. "
            "Lower optim.lr, add optim.warmup=0.05, or use trainer.precision=fp32 or bf16"
        )
    return request


def save(folder: RunFolder, learner: Learner) -> Any:
    """Write a checkpoint of the complete state in the first worker; return its file, or None in other workers."""
    sums = learner.world.sum_(learner.sums.clone())
    path = None
    if learner.world.is_first:
        path = checkpoint.save(
            folder,
            {
                "step": learner.step,
                "epoch": learner.epoch,
                "train_s": learner.train_s,
                "best": learner.best,
                "sums": sums.cpu(),
                "classes": learner.task.classes,
                "model": learner.model.state_dict(),
                "calibrated": learner.calibrated,
                "optimizer": learner.optimizer.state_dict(),
                "scaler": learner.scaler.state_dict(),
                **({} if learner.ema is None else {"ema": learner.ema.module.state_dict()}),
            },
        )
    learner.world.wait()
    return path


def restore(learner: Learner, state: dict[str, Any]) -> None:
    """Restore a checkpoint; the first worker takes the sums of all workers."""
    learner.model.load_state_dict(state["model"])
    if learner.ema is not None:
        learner.ema.module.load_state_dict(state["ema"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    learner.step, learner.epoch = state["step"], state["epoch"]
    learner.train_s, learner.best, learner.calibrated = (
        state["train_s"],
        state["best"],
        state["calibrated"],
    )
    if learner.world.is_first:
        learner.sums[: len(state["sums"])] = state["sums"]  # older versions have fewer sums
