"""`exnorm predict`: the predictions of a run for images without targets, in files."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.data import MASKS, data_set
from exnorm.data.files import BadImage, opened
from exnorm.data.index import is_image
from exnorm.data.palette import colours, overlaid
from exnorm.engine import checkpoint
from exnorm.engine.check_task import check_views
from exnorm.engine.evaluate import autocast
from exnorm.engine.launch import resolve_eval_config
from exnorm.engine.worker import device_type
from exnorm.runs.folder import RunFolder
from exnorm.tasks import Task, Views, make_task
from exnorm.tasks.segmentation import as_pixels

TOP = 5  # classes of an image in the table
COLUMNS = ("image", "rank", "class", "probability")
TABLE = "predictions.csv"


class Predictor:
    """A trained network and how it is applied.

    Args:
        overrides: settings of `exnorm eval`, such as test.flip=true checkpoint=best device=cpu.

    Raises:
        UserError: there is no run or checkpoint, or a setting cannot work.
    """

    def __init__(self, folder: RunFolder, overrides: Sequence[str]) -> None:
        self.config, wanted = checkpoint.read_config(folder), resolve_eval_config(folder.read_config(), list(overrides))
        check_views(wanted.test, self.config.task)
        ops.set_backend(self.config.ops.backend)
        state = checkpoint.find(folder, wanted.checkpoint)
        self.device, self.precision = torch.device(device_type(wanted.device)), wanted.precision
        self.task: Task = make_task(self.config.task, state["classes"])
        self.model = checkpoint.build_trained(self.config, state).to(self.device).eval()
        self.data, self.views = wanted.data, Views.of(wanted.data, wanted.test)
        self.normalize = self.task.transform(wanted.data, "eval").normalize

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Any:
        """Return the output for one image, (height, width, 3) in uint8, at its size."""
        with autocast(self.device, self.precision):
            images = self.normalize(pixels[None].to(self.device))
            return self.task.predict(self.model, images, pixels.shape[:2], self.views)

    def mask(self, image: Image.Image) -> np.ndarray:
        """Return the class of each pixel of an image, (height, width) in uint8."""
        return self(as_pixels(image))[0].argmax(0).to(torch.uint8).cpu().numpy()


def predict(run_path: Path, inputs: Sequence[Path], out: Path, overrides: Sequence[str]) -> tuple[int, list[str]]:
    """Write predictions for images, and for all images in folders. Return their number and a line for each failure.

    Classification writes `predictions.csv` with the five most likely classes of each image. Segmentation writes three
    PNG files for each image: `*_index.png` with the label values of the data set, `*_colour.png`, and `*_overlay.png`.

    Raises:
        UserError: no image was found, there is no run or checkpoint, or a setting cannot work.
    """
    files = list(_images(inputs))
    if not files:
        raise UserError(f"no image was found in {', '.join(map(str, inputs))}")
    if twice := [str(name) for name, count in Counter(name for _, name in files).items() if count > 1]:
        raise UserError(f"several images are called {twice[0]}, and their predictions would be one file. Rename them")
    predictor = Predictor(RunFolder(run_path), overrides)
    write = _write_masks if predictor.config.task.targets == MASKS else _write_rows
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).unlink(missing_ok=True)
    failed = [line for path, name in files if (line := _try(partial(write, predictor, path, name, out)))]
    return len(files) - len(failed), failed


def _try(write: Callable[[], None]) -> str:
    try:
        write()
    except BadImage as problem:
        return str(problem)
    return ""


def _images(inputs: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each image with the name of its predictions: without a suffix, below the given folder.

    Raises:
        UserError: a path does not exist.
    """
    for given in inputs:
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.is_file() and is_image(path.name.encode()))
            yield from ((path, path.relative_to(given).with_suffix("")) for path in found)
        elif given.is_file():
            yield given, Path(given.stem)
        else:
            raise UserError(f"{given}: there is no such file or folder")


def _open(path: Path) -> Image.Image:
    return opened(str(path), partial(open, path, "rb"))


def _write_rows(predictor: Predictor, path: Path, name: Path, out: Path) -> None:
    """Append the most likely classes of an image to the table."""
    output = predictor(predictor.task.prepared(predictor.data, _open(path)))
    table = out / TABLE
    is_new = not table.exists()
    with table.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for rank, (label, share) in enumerate(predictor.task.likely(output)[:TOP], 1):
            writer.writerow([path, rank, label, f"{share:.6f}"])


def _write_masks(predictor: Predictor, path: Path, name: Path, out: Path) -> None:
    """Write the classes of an image's pixels as label values, as colours, and as colours over the image."""
    image = _open(path)
    mask = predictor.mask(image)
    shades = colours(len(predictor.task.classes))
    as_labels = getattr(data_set(predictor.config.data), "to_label_ids", np.asarray)
    parts = {
        "index": Image.fromarray(as_labels(mask)),
        "colour": Image.fromarray(shades[mask]),
        "overlay": overlaid(image, Image.fromarray(mask), shades),
    }
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    for kind, drawn in parts.items():
        drawn.save(target.with_name(f"{target.name}_{kind}.png"))
