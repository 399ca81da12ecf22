"""`exnorm eval` in one worker: the accuracy of a run's checkpoint, on its own validation set or another."""

from typing import Any

from omegaconf import OmegaConf

from exnorm import ops
from exnorm.config.compose import calibration_data
from exnorm.config.schema import EvalConfig
from exnorm.data import load, validation_sets
from exnorm.data.loader import SeededImages
from exnorm.data.validation import matched
from exnorm.engine import checkpoint
from exnorm.engine.batch import plan_batch
from exnorm.engine.calibrate import batch_average, using
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import eval_loader, evaluate
from exnorm.engine.images import bad_images_of, changed
from exnorm.engine.launch import evaluation_id
from exnorm.norms import configure_scope
from exnorm.runs.folder import RunFolder
from exnorm.runs.lock import utc_now
from exnorm.runs.metrics import MetricsLog
from exnorm.tasks import Views, make_task


def evaluate_run(folder: RunFolder, config: Any, request: dict[str, Any], world: World) -> None:
    """Evaluate a checkpoint; the first worker appends a row per validation set to `evaluations.jsonl`.

    Batch averages always come from the run's own training set.

    Raises:
        UserError: there is no usable checkpoint, the set has changed or lacks a class, or an image is broken.
    """
    name_of_row = request.pop("id")
    wanted: Any = OmegaConf.merge(OmegaConf.structured(EvalConfig), request)
    ops.set_backend(config.ops.backend)
    state = checkpoint.find(folder, wanted.checkpoint)
    averages = wanted.inference == "batch_average"
    calibrated_on = calibration_data(wanted.data, config.data)
    same = calibrated_on is wanted.data
    splits = matched(load(wanted.data, train=averages and same), state["classes"], name=wanted.data.name)
    val_sets = validation_sets(wanted.data, splits)
    if evaluation_id(wanted, config) != name_of_row:
        raise changed(wanted.data)
    task = make_task(config.task, state["classes"])
    model = checkpoint.build_trained(config, {**state, "calibrated": None}).to(world.device)
    configure_scope(model)
    calibrated = {}
    if averages:
        own = splits if same else matched(load(calibrated_on), state["classes"], name=calibrated_on.name)
        bad_images = bad_images_of(folder, calibrated_on, own)
        if world.is_first and not folder.is_locked():  # a training that runs now adds to the list
            bad_images.look_again(own.train)
        train_set = SeededImages(
            own.train, task.transform(calibrated_on, "centre"), seed=config.seed, bad_images=bad_images
        )
        plan = plan_batch(config.batch, devices=1, sync=bool(config.norm.get("sync", False)))
        calibrated = batch_average(
            model,
            train_set,
            scope=plan.scope,
            batches=wanted.calibration_batches,
            workers=wanted.data.workers,
            precision=wanted.precision,
            world=world,
        )
        bad_images.check()
    views = Views.of(wanted.data, wanted.test)
    for name, images in val_sets.items():
        val_set = SeededImages(images, task.transform(wanted.data, "eval"), seed=config.seed)
        loader = eval_loader(val_set, batch_size=wanted.batch_size, workers=wanted.data.workers, world=world)
        with using(model, calibrated):
            results = evaluate(model, loader, task, precision=wanted.precision, world=world, views=views)
        if world.is_first:
            row = {
                "id": name_of_row,
                "step": state["step"],
                "time": utc_now(),
                "data": name,
                "checkpoint": wanted.checkpoint,
                "inference": wanted.inference,
                "calibration_batches": wanted.calibration_batches if calibrated else None,
                "precision": wanted.precision,
                **({"test": views.described} if views != Views(views.resize) else {}),
                "images": len(images),
                "images_of_other_classes": images.of_other_classes,
                "images_excluded": images.excluded,
                "devices": world.size,
                **results,
            }
            MetricsLog(folder.path / "evaluations.jsonl").append(row)
