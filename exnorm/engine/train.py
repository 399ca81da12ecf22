"""The training of one run in one worker. The code reads from top to bottom."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from exnorm import ops
from exnorm.analysis.ratios import LayerRatio, as_metrics, mean_ratios, measure_ratios
from exnorm.data.loader import SeededImages
from exnorm.engine import checkpoint
from exnorm.engine.banner import describe_run, seconds_per_step
from exnorm.engine.batch import plan_batch
from exnorm.engine.calibrate import Calibrated, batch_average, using
from exnorm.engine.check_recipe import check_warmup
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import evaluate_all
from exnorm.engine.images import RunImages, facts_of, keep_noise, open_images
from exnorm.engine.learner import Learner, build_learner, check, restore, save
from exnorm.engine.progress import Progress
from exnorm.engine.schedule import Schedule, make_schedule
from exnorm.engine.step import choose_passes, train_step
from exnorm.engine.stopping import Stopped
from exnorm.norms import progress_buffers
from exnorm.optim import learning_rate, set_learning_rate
from exnorm.runs.folder import RunFolder, write_json_atomic
from exnorm.runs.metrics import MetricsLog, plain, validated
from exnorm.runs.sinks import Sinks, make_sinks
from exnorm.tasks import Views, named

ROW_EVERY = 100  # optimizer steps between rows inside an epoch
GPU_CHECK_EVERY = 20  # steps between checks of the loss on a GPU; each check waits for the GPU


def train(folder: RunFolder, config: Any, world: World, stop_requests: Callable[[], int]) -> None:
    """Train or resume the run of a folder; write metrics, checkpoints and finally the record.

    Args:
        stop_requests: returns what asks for an end: the number of a signal or TIME_UP; 0 while nothing does.

    Raises:
        Stopped: after such a request, with a checkpoint written.
        UserError: a setting cannot work, an image is broken, or the loss is not finite.
    """
    trainer = config.trainer
    backend = ops.set_backend(config.ops.backend)
    if trainer.deterministic:
        torch.use_deterministic_algorithms(True)

    # Data
    plan = plan_batch(
        config.batch,
        devices=world.size,
        passes=trainer.passes,
        sync=bool(config.norm.get("sync", False)),
    )
    images = open_images(folder, config, plan, world)
    batches, bad_images = images.batches, images.bad_images

    # Model and optimizer, restored from the last checkpoint
    task = images.task
    learner = build_learner(config, plan, world, task)
    passes = choose_passes(config, learner)
    state = checkpoint.resume(folder, world)
    if state is not None:
        restore(learner, state)

    # Description of the run
    schedule = make_schedule(trainer, steps_per_epoch=batches.steps_per_epoch)
    check_warmup(config.optim, steps=schedule.steps)
    step_s = seconds_per_step(learner, config.data.image_size)
    facts = describe_run(
        learner,
        config,
        backend=backend,
        schedule=schedule,
        step_s=step_s,
        resumed=state is not None,
        world=world,
    )
    progress = Progress(folder.log_file, task, schedule, active=world.is_first)
    progress.say(facts.text)
    noise_facts = keep_noise(folder, config.data.noise, images.splits, progress) if world.is_first else {}
    probe = probe_images(images.probe_set, config.logger.probe_images, world)

    # Metrics, up to the last checkpoint
    metrics: MetricsLog | None = None
    sinks = Sinks({})
    if world.is_first:
        metrics = MetricsLog(folder.metrics_file)
        metrics.check_complete(learner.epoch)
        metrics.cut_back(learner.step, learner.epoch)
        if state is not None and learner.step == schedule.start(learner.epoch):
            keep_marked(folder, learner, checkpoint.step_file(folder, learner.step), config, schedule)
        values: Any = OmegaConf.to_container(config)
        sinks = make_sinks(folder, config.logger, run_config=values)

    def log(row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.append({"step": learner.step, "epoch": learner.epoch + 1, **row})
            sinks.log({"epoch": learner.epoch + 1, **row}, learner.step)

    # Steps
    ratios: list[LayerRatio] = []
    results: dict[str, float] = {}
    layers_progress = [*progress_buffers(learner.model), *(progress_buffers(learner.ema.module) if learner.ema else [])]
    check_every = GPU_CHECK_EVERY if world.device.type == "cuda" else 1
    with sinks:
        while learner.epoch < schedule.parts:
            batches.between(learner.step, schedule.start(learner.epoch + 1))
            learner.clock, first_step, before_s = time.monotonic(), learner.step, learner.train_s
            for batch in images.train_loader:
                rate = learning_rate(config.optim, step=learner.step, steps=schedule.steps, total_batch=plan.total)
                set_learning_rate(learner.optimizer, rate)
                for progress_of_layer in layers_progress:
                    progress_of_layer.fill_(learner.step / schedule.steps)
                learner.calibrated = None  # these statistics belong to earlier weights
                batch_sums = train_step(learner, batch, seed=config.seed, passes=passes)
                learner.step += 1
                progress.step(learner.step, learner.epoch, batch_sums)
                if learner.step % ROW_EVERY == 0:
                    log({**named(task.summarize(world.sum_(batch_sums.clone())), "batch"), "lr": rate})
                save_now = trainer.checkpoint_every_steps and learner.step % trainer.checkpoint_every_steps == 0
                if learner.step % check_every == 0 or save_now:
                    request = check(folder, learner, stop_requests())
                    bad_images.check()
                    if save_now or request:
                        learner.read_clock()
                        save(folder, learner)
                    if request:
                        raise Stopped(request)
            check(folder, learner, 0)
            bad_images.check()
            train_s = learner.read_clock() - before_s

            # End of an epoch: validate, measure the ratios, write a checkpoint
            images_done = (learner.step - first_step) * plan.total
            sums = world.sum_(learner.sums.clone())
            results, ratios = validate(learner, images, probe, config)
            row = {**named(task.summarize(sums), "train"), **results, "lr": learner.optimizer.param_groups[0]["lr"]}
            log({**row, **as_metrics(ratios), "images_per_s": images_done / train_s if images_done else None})
            sinks.table("ratios", LayerRatio._fields, ratios, learner.step)
            progress.epoch(learner.epoch, row, mean_ratios(ratios))
            learner.sums.zero_()
            learner.epoch += 1
            keep_epoch(folder, learner, results[task.metrics[0].key], config, schedule)
            request = check(folder, learner, stop_requests())
            if request and learner.epoch < schedule.parts:
                save(folder, learner)
                raise Stopped(request)

    # Record
    if world.is_first:
        bad_images.tidy()
        record = {
            **(results or last_results(folder)),
            "best": learner.best,
            "hours": learner.train_s / 3600,
            "metrics": [metric._asdict() for metric in task.metrics],
            "steps": schedule.steps,
            "epochs": schedule.parts,
            "inference": trainer.inference,
            "devices": world.size,
            **facts.record,
            **noise_facts,
            **facts_of(images),
            "ratio": mean_ratios(ratios) if results else last_ratios(folder),
        }
        write_json_atomic(folder.record_file, plain(record))


def validate(
    learner: Learner, images: RunImages, probe: Tensor | None, config: Any
) -> tuple[dict[str, float], list[LayerRatio]]:
    """Return the metrics of each validation set and each layer's ratios, by `trainer.inference`."""
    learner.calibrated = calibrate(learner, images.calibration_set, config)
    with using(learner.validated, learner.calibrated or {}):
        results = evaluate_all(
            learner.validated,
            images.val_loaders,
            learner.task,
            precision=learner.precision,
            world=learner.world,
            views=Views(config.data.resize),
        )
        ratios = measure_ratios(learner.validated, probe) if probe is not None else []
    return results, ratios


def keep_epoch(folder: RunFolder, learner: Learner, value: float, config: Any, schedule: Schedule) -> None:
    """Write a checkpoint of the epoch that just ended, if it is the best, the last, or asked for.

    Args:
        value: the primary metric.
    """
    epoch, primary = learner.epoch, learner.task.metrics[0]
    is_best = math.isfinite(value) and primary.better(value, learner.best.get(primary.key, primary.worst))
    if is_best:
        learner.best = {primary.key: value, "epoch": epoch}
    asked = epoch % config.trainer.checkpoint_every == 0 or bool(snapshots_of(epoch, config, schedule))
    if is_best or asked or epoch == schedule.parts:
        path = save(folder, learner)
        if path is not None:
            keep_marked(folder, learner, path, config, schedule)


def snapshots_of(epoch: int, config: Any, schedule: Schedule) -> list[float]:
    """Return the fractions in `trainer.snapshots` that end with this epoch."""
    return [share for share in config.trainer.snapshots if max(1, round(share * schedule.parts)) == epoch]


def keep_marked(folder: RunFolder, learner: Learner, path: Path, config: Any, schedule: Schedule) -> None:
    """Keep the checkpoint at the end of an epoch as the best one or as a snapshot, if it is one."""
    if learner.best.get("epoch") == learner.epoch:
        checkpoint.keep(path, folder.checkpoints / checkpoint.BEST)
    for share in snapshots_of(learner.epoch, config, schedule):
        checkpoint.keep(path, folder.snapshot_file(share))


def calibrate(learner: Learner, dataset: SeededImages, config: Any) -> Calibrated | None:
    """Return batch averages if `trainer.inference` asks for them, else None."""
    if config.trainer.inference == "moving_average":
        return None
    return batch_average(
        learner.validated,
        dataset,
        scope=learner.plan.scope,
        batches=config.trainer.calibration_batches,
        workers=config.data.workers,
        precision=learner.precision,
        world=learner.world,
    )


def probe_images(dataset: SeededImages, count: int, world: World) -> Tensor | None:
    """Return a fixed batch of validation images, evenly spread over the set; None if nothing is to be measured."""
    if not world.is_first or count < 1:
        return None
    count = min(count, len(dataset))
    stride = len(dataset) / count
    pixels = torch.stack([dataset[0, math.floor(i * stride)][0] for i in range(count)])
    return dataset.transform.normalize(pixels.to(world.device))


def last_results(folder: RunFolder) -> dict[str, float]:
    """Return the validation metrics of the last epoch in the log, for a run that lacks only its record."""
    rows = validated(MetricsLog.read(folder.metrics_file))
    return {key: value for key, value in rows[-1].items() if key.startswith("val/")} if rows else {}


def last_ratios(folder: RunFolder) -> dict[str, float]:
    """Return the mean ratios of the last epoch in the log."""
    rows = validated(MetricsLog.read(folder.metrics_file))
    shares: dict[str, list[float]] = {}
    for key, value in (rows[-1] if rows else {}).items():
        if key.startswith("ratio/") and not key.endswith("/std"):
            shares.setdefault(key.rpartition("/")[2], []).append(value)
    return {normalizer: sum(values) / len(values) for normalizer, values in shares.items()}
