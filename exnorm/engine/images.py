"""The images of a run: loaders for training and validation, and the entries about images in the record."""

from dataclasses import dataclass
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import fingerprint, load, noise, validation_sets
from exnorm.data.bad_images import BadImages
from exnorm.data.files import CHANGED
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.splits import Splits, labelled
from exnorm.engine.batch import BatchPlan
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import eval_loader
from exnorm.engine.progress import Progress
from exnorm.runs.folder import RunFolder, read_json, write_text_atomic
from exnorm.runs.identity import short_hash
from exnorm.runs.loader_room import check_room
from exnorm.tasks import Task, make_task


@dataclass(frozen=True)
class RunImages:
    """The task of a run, and the images on which one worker trains and validates.

    Attributes:
        calibration_set: the training images, cropped without randomness.
        probe_set: the images of the main validation set, all cropped to one size.
        val_sets, val_loaders: by the name of the set; the first one is the run's main set.
    """

    task: Task
    splits: Splits
    batches: TrainBatches
    train_loader: Loader
    calibration_set: SeededImages
    probe_set: SeededImages
    val_sets: dict[str, SeededImages]
    val_loaders: dict[str, Loader]
    bad_images: BadImages


def open_images(folder: RunFolder, config: Any, plan: BatchPlan, world: World) -> RunImages:
    """Load the data sets of a run, and the list of broken images of an earlier attempt.

    Raises:
        UserError: there are fewer images than one batch needs, or the files are not those that named the run.
    """
    splits = load(config.data)
    _check_unchanged(folder, config.data)
    task = make_task(config.task, splits.classes)
    batches = TrainBatches(
        len(splits.train),
        total=plan.total,
        seed=config.seed,
        rank=world.rank,
        ranks=world.size,
    )
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"batch={config.batch} takes {plan.total} images a step, but data has {len(splits.train)}. "
            "Use a smaller batch"
        )
    bad_images = bad_images_of(folder, config.data, splits)
    if world.is_first:
        bad_images.look_again(splits.train)
    workers, seed = config.data.workers, config.seed
    in_val, centre = task.transform(config.data, "eval"), task.transform(config.data, "centre")
    train_set = SeededImages(splits.train, task.transform(config.data, "train"), seed=seed, bad_images=bad_images)
    if config.trainer.inference == "batch_average":  # its loader starts behind an epoch, when a refusal would cost it
        batch_bytes = plan.scope * train_set.transform.sample_bytes
        check_room(workers, batches=config.trainer.calibration_batches, batch_bytes=batch_bytes)
    val_sets = {
        name: SeededImages(images, in_val, seed=seed) for name, images in validation_sets(config.data, splits).items()
    }
    return RunImages(
        task,
        splits,
        batches,
        Loader(train_set, batches, workers=workers, device=world.device, channels_last=config.trainer.channels_last),
        SeededImages(splits.train, centre, seed=seed, bad_images=bad_images),
        SeededImages(next(iter(val_sets.values())).images, centre, seed=seed),
        val_sets,
        {
            name: eval_loader(
                val_set,
                batch_size=config.trainer.eval_batch_size,
                workers=workers,
                world=world,
            )
            for name, val_set in val_sets.items()
        },
        bad_images,
    )


def _check_unchanged(folder: RunFolder, data: Any) -> None:
    """Raise UserError if files have changed since the run was named after them; runs of earlier versions pass."""
    named_after = (read_json(folder.provenance_file) or {}).get("data_id")
    if named_after not in (None, short_hash(fingerprint(data))):
        raise changed(data)


def changed(data: Any) -> UserError:
    """Return the error for a data set whose files are not those that named the run or the evaluation."""
    return UserError(f"the files of data={data.name} have changed since the start. {CHANGED}")


def bad_images_of(folder: RunFolder, data_config: Any, splits: Splits) -> BadImages:
    """Return the broken training images of a set, as listed in the run folder."""
    return BadImages(
        folder.bad_images_file,
        data=data_config.name,
        images=len(splits.train),
        max_fraction=data_config.max_bad_fraction,
    )


def keep_noise(folder: RunFolder, config: Any, splits: Splits, progress: Progress) -> dict[str, Any]:
    """Write the wrong labels to a file and print their number; return the record's entry about them."""
    if not noise.is_on(config):
        return {}
    train = labelled(splits.train, what="data.noise")
    facts = noise.facts(config, train)
    write_text_atomic(folder.noisy_labels_file, noise.as_csv(noise.wrong_labels(train)))
    wrong = facts["wrong_labels"]
    progress.say(f"label noise: {wrong} of {len(train)} training labels are wrong (noisy_labels.csv)")
    return {"noise": facts}


def facts_of(images: RunImages) -> dict[str, Any]:
    """Return the record's entries about images: how many, how many were broken, and how many the user left out."""
    facts: dict[str, Any] = {
        "train_images": len(images.splits.train),
        "val_images": {name: len(val_set) for name, val_set in images.val_sets.items()},
        "bad_images": len(images.bad_images.rows()),
    }
    excluded = {"train": images.splits.train.excluded}
    excluded |= {f"val/{name}": val_set.images.excluded for name, val_set in images.val_sets.items()}
    return facts | ({"excluded_images": excluded} if any(excluded.values()) else {})
