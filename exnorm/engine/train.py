"""The training of one run, as one worker does it. Reads from top to bottom."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exnorm import ops
from exnorm.analysis.ratios import LayerRatio, as_metrics, mean_ratios, measure_ratios
from exnorm.config.errors import UserError
from exnorm.data import data_set
from exnorm.data.loader import SeededImages, TrainBatches, make_loader, mixed_seed
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.engine import checkpoint
from exnorm.engine.banner import describe_run, seconds_per_step
from exnorm.engine.batch import BatchPlan, plan_batch
from exnorm.engine.calibrate import Calibrated, batch_average, using
from exnorm.engine.distributed import World, replica_group
from exnorm.engine.evaluate import autocast, eval_loader, evaluate
from exnorm.engine.progress import Progress
from exnorm.models import build_model, load_weights
from exnorm.norms import commit_running_stats, configure_scope
from exnorm.optim import build_optimizer, learning_rate, set_learning_rate
from exnorm.runs.folder import RunFolder, write_json_atomic
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.sinks import make_sinks
from exnorm.tasks.classification import SUMS, Classification, summarize

ROW_EVERY = 100  # optimizer steps between rows inside an epoch
GPU_CHECK_EVERY = 20  # steps between looks at the loss on a GPU, each of which waits for it


class Stopped(Exception):
    """A signal ended the run after a checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass
class Learner:
    """What learns: the bare model, the model as it is called (compiled, DDP), optimizer and scaler, and how far."""

    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    task: Classification
    plan: BatchPlan
    precision: str
    world: World
    sums: Tensor
    classes: list[str]
    bad_step: Tensor  # the first step with a non-finite loss; huge while there is none
    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch under way
    train_s: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    calibrated: Calibrated | None = None


NO_BAD_STEP = 2**62


def train(folder: RunFolder, config: Any, world: World, stop_signal: Callable[[], int]) -> None:
    """Train, or go on with, the run of a folder; writes metrics, checkpoints and finally the record.

    Args:
        stop_signal: the number of the signal that asks for an end, 0 while there is none.

    Raises:
        Stopped: after a signal, with a checkpoint written.
        UserError: a setting that cannot work, a broken image, a non-finite loss.
    """
    trainer = config.trainer
    backend = ops.set_backend(config.ops.backend)
    if trainer.deterministic:
        torch.use_deterministic_algorithms(True)

    # Data
    splits = data_set(config.data.name).load(config.data)
    plan = plan_batch(
        config.batch,
        devices=world.size,
        passes=trainer.passes,
        sync=bool(config.norm.get("sync", False)),
    )
    batches = TrainBatches(
        len(splits.train),
        total=plan.total,
        seed=config.seed,
        rank=world.rank,
        ranks=world.size,
    )
    if batches.steps_per_epoch == 0:
        raise UserError(f"batch={config.batch} takes {plan.total} images a step; data has {len(splits.train)}")
    train_set = SeededImages(splits.train, train_transform(config.data), seed=config.seed)
    calibration_set = SeededImages(splits.train, eval_transform(config.data), seed=config.seed)
    val_set = SeededImages(splits.val, eval_transform(config.data), seed=config.seed)
    on_gpu = world.device.type == "cuda"
    train_loader = make_loader(train_set, batches, workers=config.data.workers, pin_memory=on_gpu)
    val_loader = eval_loader(
        val_set,
        batch_size=trainer.eval_batch_size,
        workers=config.data.workers,
        world=world,
    )

    # Model, optimizer, and where the last checkpoint left them
    learner = build_learner(config, plan, world, list(splits.classes))
    state = checkpoint.load_latest(folder)
    if state is not None:
        restore(learner, state)
    metrics = MetricsLog(folder.metrics_file)
    sinks = []
    if world.is_first:
        metrics.cut_back(learner.step)
        resume_step = learner.step if state is not None else None
        values: Any = OmegaConf.to_container(config)
        sinks = make_sinks(folder, config.logger, resume_step=resume_step, run_config=values)

    def log(row: dict[str, Any]) -> None:
        if world.is_first:
            metrics.append({"step": learner.step, "epoch": learner.epoch + 1, **row})
            for sink in sinks:
                sink.log({"epoch": learner.epoch + 1, **row}, learner.step)

    # What will run
    epoch_steps = batches.steps_per_epoch
    steps = trainer.epochs * epoch_steps
    step_s = seconds_per_step(learner, config.data.image_size)
    facts = describe_run(
        learner,
        config,
        backend=backend,
        steps=steps,
        step_s=step_s,
        resumed=state is not None,
        world=world,
    )
    progress = Progress(folder.log_file, steps=steps, epochs=trainer.epochs, active=world.is_first)
    progress.say(facts.text)

    # Steps
    probe = probe_images(val_set, config.logger.probe_images, world)
    ratios: list[LayerRatio] = []
    results: dict[str, float] = {}
    check_every = GPU_CHECK_EVERY if on_gpu else 1
    while learner.epoch < trainer.epochs:
        batches.start(learner.epoch, learner.step - learner.epoch * epoch_steps)
        epoch_start, first_step = time.monotonic(), learner.step
        for images, labels in train_loader:
            rate = learning_rate(
                config.optim,
                step=learner.step,
                steps_per_epoch=epoch_steps,
                epochs=trainer.epochs,
                total_batch=plan.total,
            )
            set_learning_rate(learner.optimizer, rate)
            batch_sums = train_step(learner, images, labels, seed=config.seed)
            learner.step += 1
            progress.step(learner.step, learner.epoch, batch_sums)
            if learner.step % ROW_EVERY == 0:
                log({**summarize(world.sum_(batch_sums.clone()), "batch"), "lr": rate})
            save_now = trainer.checkpoint_every_steps and learner.step % trainer.checkpoint_every_steps == 0
            if learner.step % check_every == 0 or save_now:
                signum = check(learner, stop_signal())
                if save_now or signum:
                    save(folder, learner)
                if signum:
                    raise Stopped(signum)
        train_s = time.monotonic() - epoch_start
        learner.train_s += train_s
        check(learner, 0)

        # End of an epoch: validate, measure the ratios, keep it
        images_done = (learner.step - first_step) * plan.total
        sums = world.sum_(learner.sums.clone())
        learner.calibrated = calibrate(learner, calibration_set, config)
        with using(learner.model, learner.calibrated or {}):
            results = evaluate(
                learner.model,
                val_loader,
                learner.task,
                precision=trainer.precision,
                world=world,
            )
            ratios = measure_ratios(learner.model, probe) if probe is not None else []
        row = {
            **summarize(sums, "train"),
            **results,
            "lr": learner.optimizer.param_groups[0]["lr"],
        }
        log(
            {
                **row,
                **as_metrics(ratios),
                "images_per_s": images_done / train_s if images_done else None,
            }
        )
        for sink in sinks:
            sink.table("ratios", LayerRatio._fields, ratios, learner.step)
        progress.epoch(learner.epoch, row, mean_ratios(ratios))
        learner.sums.zero_()
        is_best = results["val/top1"] > learner.best.get("val/top1", -1.0)
        if is_best:
            learner.best = {"val/top1": results["val/top1"], "epoch": learner.epoch + 1}
        learner.epoch += 1
        last = learner.epoch == trainer.epochs
        if is_best or last or learner.epoch % trainer.checkpoint_every == 0:
            path = save(folder, learner)
            if is_best and path is not None:
                checkpoint.keep_best(folder, path)
        signum = check(learner, stop_signal())
        if signum and not last:
            save(folder, learner)
            raise Stopped(signum)

    # Record
    for sink in sinks:
        sink.close()
    if world.is_first:
        final = results or last_results(folder)
        record = {
            **final,
            "best": learner.best,
            "hours": learner.train_s / 3600,
            "steps": steps,
        }
        record |= {
            "epochs": trainer.epochs,
            "inference": trainer.inference,
            "devices": world.size,
            **facts.record,
        }
        record["ratio"] = mean_ratios(ratios) if results else last_ratios(folder)
        write_json_atomic(folder.record_file, record)


def build_learner(config: Any, plan: BatchPlan, world: World, classes: list[str]) -> Learner:
    """Model, optimizer and scaler of a fresh run, on this worker's device."""
    torch.manual_seed(mixed_seed(config.seed))
    model = build_model(config.model, config.norm, num_classes=len(classes))
    if config.model.init_from is not None:
        source = config.model.init_from
        for note in load_weights(model, checkpoint.read_weights(source), source=source):
            if world.is_first:
                print(f"model.init_from: {note}", flush=True)
    memory_format = torch.channels_last if config.trainer.channels_last else torch.contiguous_format
    model = model.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
    configure_scope(model, replicas=plan.replicas_per_pass, group=replica_group(world, plan.span))
    net: nn.Module = torch.compile(model) if config.trainer.compile else model  # type: ignore[assignment]
    if world.size > 1:
        net = DistributedDataParallel(
            net,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
        )
    return Learner(
        model=model,
        net=net,
        optimizer=build_optimizer(model, config.optim, total_batch=plan.total),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.trainer.precision == "fp16"),
        task=Classification(config.task),
        plan=plan,
        precision=config.trainer.precision,
        world=world,
        sums=torch.zeros(len(SUMS), dtype=torch.float64, device=world.device),
        classes=classes,
        bad_step=torch.tensor(NO_BAD_STEP, device=world.device),
    )


def train_step(learner: Learner, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
    """One optimizer step over this worker's share of a global batch; returns the share's metric sums."""
    world, plan = learner.world, learner.plan
    torch.manual_seed(mixed_seed(seed, learner.step, world.rank))  # dropout; no generator state to restore
    images, labels = (
        images.to(world.device, non_blocking=True),
        labels.to(world.device, non_blocking=True),
    )
    batch_sums = torch.zeros_like(learner.sums)
    for index, (x, y) in enumerate(zip(images.chunk(plan.passes), labels.chunk(plan.passes), strict=True)):
        last = index == plan.passes - 1
        ddp = isinstance(learner.net, DistributedDataParallel)
        with learner.net.no_sync() if ddp and not last else nullcontext():  # type: ignore[operator]
            with autocast(world.device, learner.precision):
                logits = learner.net(x)
            loss = learner.task.loss(logits, y) / plan.passes
            learner.scaler.scale(loss).backward()
        first_bad = torch.where(loss.detach().isfinite(), NO_BAD_STEP, learner.step + 1)
        learner.bad_step = torch.minimum(learner.bad_step, first_bad)
        batch_sums += learner.task.sums(logits.detach(), y)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    commit_running_stats(learner.model)
    learner.sums += batch_sums
    return batch_sums


def check(learner: Learner, signum: int) -> int:
    """Let all workers learn of a signal or a non-finite loss that one of them met; return the signal.

    Raises:
        UserError: the loss was not finite; the last checkpoint is from before.
    """
    signum, negated = learner.world.largest(signum, -int(learner.bad_step))
    if -negated != NO_BAD_STEP:
        raise UserError(
            f"the loss is not finite at step {-negated} (epoch {learner.epoch + 1}); the last checkpoint is kept. "
            "Lower optim.lr, add optim.warmup=0.05, or use trainer.precision=fp32 or bf16"
        )
    return signum


def calibrate(learner: Learner, dataset: SeededImages, config: Any) -> Calibrated | None:
    """Batch averages where the run's rule of inference asks for them."""
    if config.trainer.inference == "moving_average":
        return None
    return batch_average(
        learner.model,
        dataset,
        scope=learner.plan.scope,
        batches=config.trainer.calibration_batches,
        workers=config.data.workers,
        precision=learner.precision,
        world=learner.world,
    )


def save(folder: RunFolder, learner: Learner) -> Any:
    """Write a checkpoint of the whole state, by the first worker; return its file (None elsewhere)."""
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
                "classes": learner.classes,
                "model": learner.model.state_dict(),
                "calibrated": learner.calibrated,
                "optimizer": learner.optimizer.state_dict(),
                "scaler": learner.scaler.state_dict(),
            },
        )
    learner.world.wait()
    return path


def restore(learner: Learner, state: dict[str, Any]) -> None:
    """Go back to a checkpoint; the first worker takes the sums of all."""
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    learner.step, learner.epoch = state["step"], state["epoch"]
    learner.train_s, learner.best, learner.calibrated = (
        state["train_s"],
        state["best"],
        state["calibrated"],
    )
    if learner.world.is_first:
        learner.sums.copy_(state["sums"])


def probe_images(dataset: SeededImages, count: int, world: World) -> Tensor | None:
    """A fixed batch of validation images, evenly spread over the set; None where nothing is to be measured."""
    if not world.is_first or count < 1:
        return None
    count = min(count, len(dataset))
    stride = len(dataset) / count
    return torch.stack([dataset[0, math.floor(i * stride)][0] for i in range(count)]).to(world.device)


def last_results(folder: RunFolder) -> dict[str, float]:
    """The validation metrics of the last epoch in the log, for a run whose record alone was missing."""
    rows = [row for row in MetricsLog.read(folder.metrics_file) if "val/top1" in row]
    return {key: rows[-1][key] for key in ("val/loss", "val/top1", "val/top5")} if rows else {}


def last_ratios(folder: RunFolder) -> dict[str, float]:
    """The mean ratios of the last epoch in the log."""
    rows = [row for row in MetricsLog.read(folder.metrics_file) if "val/top1" in row]
    shares: dict[str, list[float]] = {}
    for key, value in (rows[-1] if rows else {}).items():
        if key.startswith("ratio/") and not key.endswith("/std"):
            shares.setdefault(key.rpartition("/")[2], []).append(value)
    return {normalizer: sum(values) / len(values) for normalizer, values in shares.items()}
