"""`exnorm compare`: validation images with their masks, beside the masks that several runs predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import MASKS, load, validation_sets
from exnorm.data.palette import colours, overlaid
from exnorm.data.splits import MaskedImages
from exnorm.data.validation import matched
from exnorm.diagnostics.doctor_lines import evenly_spaced
from exnorm.diagnostics.mask_sheet import draw_sheet
from exnorm.diagnostics.predict import Predictor
from exnorm.engine.check_task import check_targets
from exnorm.runs.folder import RunFolder


def compare(run_paths: Sequence[Path], count: int, overrides: Sequence[str]) -> Image.Image:
    """Return a sheet with a row for each image: the image, its mask, and the prediction of each run.

    Args:
        count: number of images, evenly spaced over the first run's validation set.
        overrides: settings of `exnorm eval`, such as data.split=test.

    Raises:
        UserError: no run is given, a run is of another task or has other classes, the data have no masks, or an image
            is broken.
    """
    if not run_paths:
        raise UserError("give the folders of one or more runs of task=segmentation")
    predictors = [Predictor(RunFolder(path), overrides) for path in run_paths]
    first = predictors[0]
    for path, predictor in zip(run_paths, predictors, strict=True):
        if predictor.config.task.targets != MASKS:
            raise UserError(f"{path} is a run of task={predictor.config.task.name}, which has no masks to compare")
        if list(predictor.task.classes) != list(first.task.classes):
            raise UserError(f"{path} has other classes than {run_paths[0]}. Compare runs on the same data")
    check_targets(first.data, first.config.task)
    splits = matched(load(first.data, train=False), first.task.classes, name=first.data.name)
    images = next(iter(validation_sets(first.data, splits).values()))
    assert isinstance(images, MaskedImages)
    shades = colours(len(first.task.classes))
    tiles = []
    for index in evenly_spaced(len(images), count):
        image, mask = images.open(index)
        masks = [mask, *(Image.fromarray(predictor.mask(image)) for predictor in predictors)]
        tiles += [image, *(overlaid(image, each, shades) for each in masks)]
    headings = ["image", "mask", *_names([predictor.config for predictor in predictors], run_paths)]
    return draw_sheet(tiles, first.task.classes, columns=len(headings), headings=headings)


def _names(configs: Sequence[Any], run_paths: Sequence[Path]) -> list[str]:
    """Return the normalizers of runs, or the names of their folders if the normalizers are not all different."""
    names = [f"{config.norm.name}{' sync' if config.norm.get('sync') else ''}" for config in configs]
    return names if len(set(names)) == len(names) else [path.resolve().name for path in run_paths]
