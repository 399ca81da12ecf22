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
from exnorm.data.transforms import eval_transform
from exnorm.engine import checkpoint
from exnorm.runs.folder import RunFolder

SHOWN_CLASSES = 3


class Explained(NamedTuple):
    """One image with the model's prediction and ratios.

    Attributes:
        pixels: the crop, (height, width, 3).
        guesses: the most likely classes with their probabilities.
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
    transform = eval_transform(config.data)
    found = []
    for name, image in opened_images:
        pixels = np.asarray(transform.crop(image)).transpose(1, 2, 0)
        batch = transform.normalize(torch.from_numpy(pixels.copy())[None])
        shares = torch.softmax(model(batch)[0].double(), 0)
        top = shares.topk(min(SHOWN_CLASSES, len(shares)))
        guesses = [
            (str(state["classes"][label]), float(share))
            for share, label in zip(top.values, top.indices.tolist(), strict=True)
        ]
        rows = [(row.layer, row.ratio, row.normalizer, row.mean) for row in measure_ratios(model, batch)]
        frame = pd.DataFrame(rows, columns=["layer", "kind", "normalizer", "mean"])
        found.append(Explained(name, pixels, guesses, frame))
    return found
