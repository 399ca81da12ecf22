"""`exnorm ratios RUN_DIR --by-class`: measure the ratios of validation images by class, at each kept checkpoint.

The last checkpoint is measured in all layers. Earlier snapshots (`trainer.snapshots`) are measured in a bottom, a
middle and a top layer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from exnorm.analysis.ratios import mixing_layers, read_ratios
from exnorm.config.errors import UserError, suggest
from exnorm.data import load, validation_sets
from exnorm.data.loader import Loader, SeededImages, fixed_batches
from exnorm.data.splits import Images
from exnorm.data.transforms import eval_transform
from exnorm.data.validation import matched
from exnorm.engine import checkpoint
from exnorm.engine.launch import evaluation_id, resolve_eval_config
from exnorm.engine.worker import device_type
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.layer_ratios import CLASS_COLUMNS, bottom_middle_top, read_class_ratios

CLASSES = 10  # number of classes if none are named, evenly spaced
IMAGES = 50  # per class, evenly spaced; as many as in ImageNet's validation set
BATCH = 50


def measured_sets(run_path: Path, overrides: Sequence[str], names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the ratios by class on the run's own validation set and on that of `overrides`, by the set's name."""
    folder = RunFolder(run_path)
    own = measure_by_class(folder, [], names)
    found = {str(own["data"].iloc[0]): own}
    if overrides:
        other = measure_by_class(folder, overrides, names)
        name = str(other["data"].iloc[0])
        found[f"{name}-other" if name in found else name] = other
    return found


def measure_by_class(folder: RunFolder, overrides: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """Return mean and deviation of the ratios of each class. They are kept in the run folder and measured once.

    Args:
        overrides: `data=NAME`, `data.root=DIR`, ... for another validation set than the run's own.
        names: the classes; if empty, CLASSES of them.

    Returns:
        A table of data, epoch, layer, class, normalizer, images, mean, std (of the population).

    Raises:
        UserError: the norm has no ratios of each image, a class is unknown, or there is no checkpoint.
    """
    other = [word for word in overrides if not word.startswith(("data=", "data."))]
    if other:
        raise UserError(f"{other[0]}: --by-class takes data=NAME and data.KEY=VALUE")
    config = checkpoint.read_config(folder)
    trained = folder.read_config()
    wanted = resolve_eval_config(trained, list(overrides))
    last = checkpoint.find(folder, "last")
    file = folder.class_ratios_file(evaluation_id(wanted, trained) + _suffix(names), last["step"])
    if file.is_file():
        return read_class_ratios(file)
    device = torch.device(device_type(wanted.device))
    classes = list(last["classes"])
    chosen = _positions(classes, names)
    splits = matched(load(wanted.data, train=False), classes, name=wanted.data.name)
    name, images = next(iter(validation_sets(wanted.data, splits).items()))
    if not isinstance(images, Images):
        raise UserError(f"{name} has masks. --by-class measures images that have one label each")
    indices = [_of_class(images, label) for label in chosen]
    dataset = SeededImages(images, eval_transform(wanted.data), seed=config.seed)
    batches = fixed_batches([int(index) for found in indices for index in found], BATCH)
    loader = Loader(dataset, batches, workers=wanted.data.workers, device=device)
    rows = []
    for state in (*_snapshots_before(folder, last["epoch"]), last):
        model = checkpoint.build_trained(config, state).to(device)
        ratio_NK = _ratios_of(model, loader, folder)
        layers = list(ratio_NK) if state is last else bottom_middle_top(list(ratio_NK))
        for layer in layers:
            parts = ratio_NK[layer].double().split([len(found) for found in indices])
            normalizers: Any = mixing_layers(model)[layer].normalizers
            for label, part in zip(chosen, parts, strict=True):
                rows += [
                    (name, state["epoch"], layer, classes[label], normalizer, len(part), *_mean_and_std(part[:, k]))
                    for k, normalizer in enumerate(normalizers)
                ]
    frame = pd.DataFrame(rows, columns=list(CLASS_COLUMNS))
    write_text_atomic(file, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return read_class_ratios(file)


def _ratios_of(model: nn.Module, loader: Loader, folder: RunFolder) -> dict[str, Tensor]:
    """Return the ratios of all images, (N, K), for each layer that has ratios of each image."""
    found: dict[str, list[Tensor]] = {}
    for images, *_ in loader:
        for layer, ratios in read_ratios(model, images).items():
            if "lambda" in ratios:
                found.setdefault(layer, []).append(ratios["lambda"].cpu())
    if not found:
        raise UserError(f"{folder.path}: --by-class needs ratios of each image, and only norm=en has them")
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _snapshots_before(folder: RunFolder, epoch: int) -> Iterator[dict[str, Any]]:
    """Yield the snapshots of earlier epochs in order, each epoch once."""
    before = 0
    for path in folder.snapshot_files():
        state = checkpoint.read(path)
        if before < state["epoch"] < epoch:
            before = state["epoch"]
            yield state


def _positions(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    if not names:
        return sorted({int(place) for place in np.linspace(0, len(classes) - 1, CLASSES).round()})
    for name in names:
        if name not in classes:
            raise UserError(f"--class {name}: the run has no such class: {suggest(name, classes)}")
    return [classes.index(name) for name in dict.fromkeys(names)]


def _of_class(images: Images, label: int) -> np.ndarray:
    labels = np.asarray(images.labels if images.clean_labels is None else images.clean_labels)
    found = np.flatnonzero(labels == label)
    if not len(found):
        raise UserError(f"the validation set has no image of class number {label}. Name other classes with --class")
    return found[np.linspace(0, len(found) - 1, min(IMAGES, len(found))).round().astype(int)]


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))


def _suffix(names: Sequence[str]) -> str:
    return "-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:8] if names else ""
