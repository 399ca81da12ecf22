"""`exnorm doctor data=NAME ...`: check a data set before a long training.

It prints counts per split and class, classes that do not match, broken files, image sizes, and the loader's speed.
It compares mean and deviation of the channels with the constants in use. It draws a sheet of augmented training images
with their labels. `doctor_masks` has the checks of sets with masks.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from exnorm.config.compose import compose_train
from exnorm.data import fingerprint, load, noise, validation_sets
from exnorm.data.bad_images import BadImages
from exnorm.data.files import BadImage
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.pairs import Unpaired
from exnorm.data.paths import root_of
from exnorm.data.sets import webvision
from exnorm.data.splits import Images, MaskedImages, Splits
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.diagnostics import doctor_masks
from exnorm.diagnostics.doctor_lines import (
    SHOWN,
    Look,
    evenly_spaced,
    fitted,
    list_broken,
    print_channels,
    print_opened,
    print_sizes,
    sheet_font,
)
from exnorm.runs.counted_warnings import counted_warnings
from exnorm.runs.folder import check_out

BATCH = 32
ROWS, COLUMNS, TILE, CAPTION = 6, 8, 128, 18  # of the sheet; px


def run(overrides: Sequence[str], count: int, sheet: Path | None) -> int:
    """Print the results of all checks. Return 0 if a training can start, else 1.

    The broken images are listed in `<name>-broken.txt` beside the sheet, a file for `data.exclude`.

    Args:
        count: number of images of each split to open, evenly spaced; 0 opens all.
        sheet: the PNG file; without it, `<name>-sheet.png` in the current folder.
    """
    with counted_warnings():
        return _examine(overrides, count, sheet)


def _examine(overrides: Sequence[str], count: int, sheet: Path | None) -> int:
    config = compose_train(list(overrides)).data
    path = sheet or Path(f"{config.name}-sheet.png")
    check_out(path, ".png")
    broken = path.with_name(f"{config.name}-broken.txt")
    try:
        fingerprint(config)
    except Unpaired as problem:
        print(f"FAIL: {problem}")
        list_broken(config, broken, problem.problems)
        return 1
    from_files = OmegaConf.merge(config, {"cache": False})  # a check reads the files themselves
    splits = load(from_files)
    named = {f"val ({name})": images for name, images in validation_sets(from_files, splits).items()}
    if isinstance(splits.train, MaskedImages):
        looks = doctor_masks.examine(config, splits, named, count, path)
    else:
        looks = _examine_labels(config, splits, named, count, path)
    return _verdict(config, looks, broken)


def _examine_labels(config: Any, splits: Splits, named: dict[str, Any], count: int, path: Path) -> dict[str, Look]:
    """Print what there is to say of images with labels, draw their sheet, and return the look at each split."""
    train = splits.train
    assert isinstance(train, Images)
    for name, images in {"train": train, **named}.items():
        print(_counts(name, images, splits.classes))
    for line in _labels(config, train):
        print(line)
    looks = {name: _look(config, name, images, count) for name, images in {"train": train, **named}.items()}
    with tempfile.TemporaryDirectory() as folder:
        replaced = BadImages(Path(folder) / "bad.csv", data=config.name, images=len(train), max_fraction=1)
        dataset = SeededImages(load(config).train, train_transform(config), seed=0, bad_images=replaced)
        print(_speed(config, dataset, count))
        draw_sheet(dataset, splits.classes).save(path, optimize=True)
    print(f"sheet: {ROWS * COLUMNS} augmented training images with their labels in {path}")
    return looks


def _verdict(config: Any, looks: dict[str, Look], broken: Path) -> int:
    """List the broken files, print what prevents a training, and return 1 if something does, else 0."""
    train, validation = looks["train"], [look for name, look in looks.items() if name != "train"]
    bad_val = [problem for look in validation for problem in look.bad]
    share = len(train.bad) / max(1, train.opened)
    if train.bad or bad_val:
        list_broken(config, broken, [(problem.name, problem.reason) for problem in [*train.bad, *bad_val]])
    wrong = sum(look.wrong for look in looks.values())
    if wrong:
        print(f"FAIL: {wrong} of the opened masks have values that are no classes")
    if bad_val:
        print(f"FAIL: broken validation images. Repair them, or leave them out with data.exclude={broken}")
    if share > config.max_bad_fraction:
        print(f"FAIL: {100 * share:.2f} % of the training images are broken; data.max_bad_fraction allows less")
    return int(bool(bad_val or wrong) or share > config.max_bad_fraction)


def _counts(split: str, images: Images, classes: Sequence[str]) -> str:
    """Return the number of images, in all and per class, and the classes without images."""
    each = np.bincount(np.asarray(images.labels, np.int64), minlength=len(classes))
    line = (
        f"{split}: {len(images)} images in {len(classes)} classes, {each.min()} to {each.max()} each "
        f"(median {np.median(each):.0f})"
    )
    empty = [name for name, number in zip(classes, each, strict=True) if number == 0]
    line += f"; no images of {len(empty)}: {', '.join(empty[:SHOWN])}" if empty else ""
    line += f"; {images.of_other_classes} of other classes left out" if images.of_other_classes else ""
    return line + (f"; {images.excluded} excluded" if images.excluded else "")


def _labels(config: Any, train: Images) -> Iterator[str]:
    """Yield lines on label noise, and on WebVision's labels against its queries."""
    if noise.is_on(config.noise):
        wrong = noise.wrong_labels(train)
        yield f"label noise: {config.noise.kind}, {len(wrong)} of {len(train)} training labels are wrong"
    if config.origin is not None:
        root = root_of(config, layout=webvision.LAYOUT, name="webvision")
        if not (root / "info" / webvision.QUERY_MAP).is_file():
            yield f"queries: there is no info/{webvision.QUERY_MAP} to compare the labels with"
            return
        queries = webvision.query_labels(root)
        part = webvision.found(config, root, train=True)["train"]
        folders = (Path(name).parent.name for name in part.names)
        odd = sum(queries.get(folder) != label for folder, label in zip(folders, part.labels, strict=True))
        yield f"queries: {odd} of {len(part)} labels differ from the label of their query's folder"


def _look(config: Any, split: str, images: Images, count: int) -> Look:
    """Open images of a split, print their sizes and channel statistics, and return the broken ones."""
    chosen = evenly_spaced(len(images), count)
    transform = eval_transform(config)
    bad, sizes, sums = [], [], np.zeros((2, 3))
    for index in chosen:
        try:
            image = images.open_image(index)
        except BadImage as problem:
            bad.append(problem)
            continue
        sizes.append(image.size)
        pixels = np.asarray(transform.crop(image)).reshape(3, -1) / 255
        sums += np.stack([pixels.mean(1), np.square(pixels).mean(1)])
    print_opened(split, opened=len(chosen), total=len(images), bad=bad)
    if sizes:
        print_sizes(sizes)
        mean, mean_of_squares = sums / len(sizes)
        print_channels(mean, mean_of_squares, config)
    return Look(len(chosen), bad)


def _speed(config: Any, dataset: SeededImages, count: int) -> str:
    """Return a line with the loader's images per second, without its start."""
    count = min(max(count, 4 * BATCH), len(dataset))
    total = max(1, min(BATCH, count // 4))
    batches = TrainBatches(count, total=total, seed=0)
    loader = Loader(dataset, batches, workers=config.workers, device=torch.device("cpu"))
    steps, start = -1, 0.0
    for _ in loader:
        if steps < 0:
            start = time.perf_counter()
        steps += 1
    if steps < 1:
        return "loader: too few images to measure its speed"
    speed = steps * total / (time.perf_counter() - start)
    workers = loader.batches.num_workers
    return f"loader: {speed:.0f} images of {config.image_size} px per second with {workers} workers and no training"


def draw_sheet(dataset: SeededImages, classes: Sequence[str]) -> Image.Image:
    """Draw augmented training images, evenly spaced over the set, each above the name of its label."""
    font = sheet_font()
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4), ROWS * (TILE + CAPTION + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, index in enumerate(np.linspace(0, len(dataset) - 1, ROWS * COLUMNS).round().astype(int)):
        pixels, label, clean = dataset[0, int(index)]
        left, top = place % COLUMNS * (TILE + 4), place // COLUMNS * (TILE + CAPTION + 4)
        sheet.paste(Image.fromarray(pixels.numpy()).resize((TILE, TILE)), (left, top))
        name = str(classes[label]) if label == clean else f"{classes[label]} (is {classes[clean]})"
        pen.text(
            (left + 2, top + TILE + 2),
            fitted(name, TILE, font),
            fill="black" if label == clean else "firebrick",
            font=font,
        )
    return sheet
