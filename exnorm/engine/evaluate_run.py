"""`exnorm eval`: the accuracy of a run's checkpoint, on its own validation set or another, as one worker does it."""

from typing import Any

from omegaconf import OmegaConf

from exnorm import ops
from exnorm.config.schema import EvalConfig
from exnorm.data import load
from exnorm.data.loader import SeededImages
from exnorm.data.matching import matched
from exnorm.data.transforms import eval_transform
from exnorm.engine import checkpoint
from exnorm.engine.batch import plan_batch
from exnorm.engine.calibrate import batch_average, using
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import eval_loader, evaluate
from exnorm.norms import configure_scope
from exnorm.runs.folder import RunFolder, utc_now
from exnorm.runs.metrics import MetricsLog
from exnorm.tasks.classification import Classification


def evaluate_run(folder: RunFolder, config: Any, request: dict[str, Any], world: World) -> None:
    """Evaluate a checkpoint; the first worker appends a row to `evaluations.jsonl`.

    Raises:
        UserError: no usable checkpoint, a class of the run that the set lacks, a broken image.
    """
    wanted = OmegaConf.merge(OmegaConf.structured(EvalConfig), request)
    ops.set_backend(config.ops.backend)
    state = checkpoint.find(folder, wanted.checkpoint)
    own = load(wanted.data)
    splits = matched(own, state["classes"], name=wanted.data.name)
    model = checkpoint.build_trained(config, {**state, "calibrated": None}).to(world.device)
    configure_scope(model)
    calibrated = {}
    if wanted.inference == "batch_average":
        train_set = SeededImages(splits.train, eval_transform(wanted.data), seed=config.seed)
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
    val_set = SeededImages(splits.val, eval_transform(wanted.data), seed=config.seed)
    loader = eval_loader(val_set, batch_size=wanted.batch_size, workers=wanted.data.workers, world=world)
    with using(model, calibrated):
        task = Classification(config.task)
        results = evaluate(model, loader, task, precision=wanted.precision, world=world)
    if world.is_first:
        row = {
            "step": state["step"],
            "time": utc_now(),
            "data": wanted.data.name,
            "checkpoint": wanted.checkpoint,
        }
        row |= {
            "inference": wanted.inference,
            "calibration_batches": wanted.calibration_batches if calibrated else None,
            "precision": wanted.precision,
            "images": len(val_set),
            "images_of_other_classes": len(own.val) - len(val_set),
            "devices": world.size,
            **results,
        }
        MetricsLog(folder.path / "evaluations.jsonl").append(row)
