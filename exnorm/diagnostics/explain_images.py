"""The prediction of a trained model for single images, and the ratios of every layer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from exnorm.analysis.ratios import measure_ratios, mixing_layers
from exnorm.config.errors import UserError
from exnorm.data.files import opened
from exnorm.engine import checkpoint
from exnorm.runs.folder import RunFolder
from exnorm.tasks import Views, make_task

SHOWN_CLASSES = 3


class Explained(NamedTuple):
    """One image with the model's prediction and ratios.

    Attributes:
        pixels: the crop, or with masks the complete image, (height, width, 3).
        guesses: the most likely classes with their probabilities, or with masks their shares of the pixels.
        ratios: layer, kind, normalizer, mean; layers in the order of the network.
    """

    name: str
    pixels: NDArray[np.uint8]
    guesses: list[tuple[str, float]]
    ratios: pd.DataFrame


@torch.no_grad()
def explain_images(run_path: Path, images: Sequence[Path], *, at: str = "last") -> list[Explained]:
    """Return predictions and ratios for images, from a checkpoint of a run: last, best or a file.

    Raises:
        UserError: the model has no ratios, a file is not an image, or there is no run or checkpoint.
    """
    opened_images = [(path.name, opened(str(path), partial(open, path, "rb"))) for path in images]
    folder = RunFolder(run_path)
    config, state = checkpoint.read_config(folder), checkpoint.find(folder, at)
    model = checkpoint.build_trained(config, state).eval()
    if not mixing_layers(model):
        raise UserError(f"{run_path}: norm={config.norm.name} does not mix normalizers. Use a run of sn, ssn or en")
    task, views = make_task(config.task, state["classes"]), Views(config.data.resize)
    normalize = task.transform(config.data, "eval").normalize
    found = []
    for name, image in opened_images:
        pixels = task.prepared(config.data, image)
        batch = normalize(pixels[None])
        guesses = task.likely(task.predict(model, batch, pixels.shape[:2], views))[:SHOWN_CLASSES]
        rows = [(row.layer, row.ratio, row.normalizer, row.mean) for row in measure_ratios(model, batch)]
        frame = pd.DataFrame(rows, columns=["layer", "kind", "normalizer", "mean"])
        found.append(Explained(name, pixels.numpy(), guesses, frame))
    return found
