"""The images of a run as its trainer needs them: loaders for training and validation, and what the record says."""

from dataclasses import dataclass
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import load, noise, validation_sets
from exnorm.data.bad_images import BadImages
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.splits import Splits
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.engine.batch import BatchPlan
from exnorm.engine.distributed import World
from exnorm.engine.evaluate import eval_loader
from exnorm.engine.progress import Progress
from exnorm.runs.folder import RunFolder, write_text_atomic


@dataclass(frozen=True)
class RunImages:
    """What one worker trains and validates on.

    Attributes:
        calibration_set: the training images in the crops of validation.
        val_sets, val_loaders: by the name of the set; the first one is the run's main one.
    """

    splits: Splits
    batches: TrainBatches
    train_loader: Loader
    calibration_set: SeededImages
    val_sets: dict[str, SeededImages]
    val_loaders: dict[str, Loader]
    bad_images: BadImages


def open_images(folder: RunFolder, config: Any, plan: BatchPlan, world: World) -> RunImages:
    """Load the sets of a run and start from what an earlier attempt found broken.

    Raises:
        UserError: fewer images than a batch takes.
    """
    splits = load(config.data)
    batches = TrainBatches(
        len(splits.train),
        total=plan.total,
        seed=config.seed,
        rank=world.rank,
        ranks=world.size,
    )
    if batches.steps_per_epoch == 0:
        raise UserError(f"batch={config.batch} takes {plan.total} images a step; data has {len(splits.train)}")
    bad_images = bad_images_of(folder, config.data, splits)
    if world.is_first:
        bad_images.look_again(splits.train)
    workers, in_val = config.data.workers, eval_transform(config.data)
    train_set = SeededImages(splits.train, train_transform(config.data), seed=config.seed, bad_images=bad_images)
    val_sets = {
        name: SeededImages(images, in_val, seed=config.seed)
        for name, images in validation_sets(config.data, splits).items()
    }
    return RunImages(
        splits,
        batches,
        Loader(train_set, batches, workers=workers, device=world.device, channels_last=config.trainer.channels_last),
        SeededImages(splits.train, in_val, seed=config.seed, bad_images=bad_images),
        val_sets,
        {
            name: eval_loader(val_set, batch_size=config.trainer.eval_batch_size, workers=workers, world=world)
            for name, val_set in val_sets.items()
        },
        bad_images,
    )


def bad_images_of(folder: RunFolder, data_config: Any, splits: Splits) -> BadImages:
    """The broken training images of a set, in the list of a run."""
    return BadImages(
        folder.bad_images_file,
        data=data_config.name,
        images=len(splits.train),
        max_fraction=data_config.max_bad_fraction,
    )


def keep_noise(folder: RunFolder, config: Any, splits: Splits, progress: Progress) -> dict[str, Any]:
    """Write down and announce the wrong labels; return what the record says of them."""
    if not config.rate:
        return {}
    facts = noise.facts(config, splits.train)
    write_text_atomic(folder.noisy_labels_file, noise.as_csv(noise.wrong_labels(splits.train)))
    wrong = facts["wrong_labels"]
    progress.say(f"label noise: {wrong} of {len(splits.train)} training labels are wrong (noisy_labels.csv)")
    return {"noise": facts}


def facts_of(images: RunImages) -> dict[str, Any]:
    """What a record says of the images: how many, how many broken ones were replaced, how many the user left out."""
    facts: dict[str, Any] = {
        "train_images": len(images.splits.train),
        "val_images": {name: len(val_set) for name, val_set in images.val_sets.items()},
        "bad_images": len(images.bad_images.rows()),
    }
    excluded = {"train": images.splits.train.excluded}
    excluded |= {f"val/{name}": val_set.images.excluded for name, val_set in images.val_sets.items()}
    return facts | ({"excluded_images": excluded} if any(excluded.values()) else {})
