"""`exnorm doctor data=NAME ...`: check a data set before a long training.

It prints counts per split and class, classes that do not match, broken files, image sizes, and the loader's speed.
It compares mean and deviation of the channels with the constants in use. It draws a sheet of augmented training images
with their labels.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from exnorm.config.compose import compose_train
from exnorm.data import fingerprint, load, noise, validation_sets
from exnorm.data.bad_images import BadImages
from exnorm.data.files import BadImage
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.paths import listed_paths, root_of
from exnorm.data.sets import webvision
from exnorm.data.splits import Images, Splits
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.runs.counted_warnings import counted_warnings
from exnorm.runs.folder import check_out, write_text_atomic

SHOWN = 5
BATCH = 32
OFF_MEAN, OFF_STD = 0.1, 0.3  # larger differences of a channel are reported; STD relative to the constant
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
    fingerprint(config)
    splits = load(config)
    named = {f"val ({name})": images for name, images in validation_sets(config, splits).items()}
    print(_counts("train", splits.train, splits.classes))
    for name, images in named.items():
        print(_counts(name, images, splits.classes))
    for line in _labels(config, splits):
        print(line)
    looks = {"train": _look(config, "train", splits.train, count)}
    looks |= {name: _look(config, name, images, count) for name, images in named.items()}
    share = len(looks["train"].bad) / max(1, looks["train"].opened)
    bad_val = [problem for name in named for problem in looks[name].bad]
    broken = path.with_name(f"{config.name}-broken.txt")
    with tempfile.TemporaryDirectory() as folder:
        replaced = BadImages(Path(folder) / "bad.csv", data=config.name, images=len(splits.train), max_fraction=1)
        dataset = SeededImages(splits.train, train_transform(config), seed=0, bad_images=replaced)
        print(_speed(config, dataset, count))
        draw_sheet(dataset, splits.classes).save(path, optimize=True)
    print(f"sheet: {ROWS * COLUMNS} augmented training images with their labels in {path}")
    if looks["train"].bad or bad_val:
        _list_broken(config, broken, [*looks["train"].bad, *bad_val])
    if bad_val:
        print(f"FAIL: broken validation images. Repair them, or leave them out with data.exclude={broken}")
    if share > config.max_bad_fraction:
        print(f"FAIL: {100 * share:.2f} % of the training images are broken; data.max_bad_fraction allows less")
    return int(bool(bad_val) or share > config.max_bad_fraction)


def _list_broken(config: Any, file: Path, problems: Sequence[BadImage]) -> None:
    """Write the paths that `data.exclude` has now, and the broken images, each below its reason."""
    before = [os.fsdecode(path) for path in listed_paths(config)]
    lines = [line for problem in problems for line in (f"# {problem.reason}", problem.name)]
    write_text_atomic(file, "\n".join([*before, *lines]) + "\n")
    kept = f", below the {len(before)} of data.exclude={config.exclude}" if before else ""
    print(f"broken images: all {len(problems)} are listed in {file}{kept}; data.exclude={file} leaves them out")


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


def _labels(config: Any, splits: Splits) -> Iterator[str]:
    """Yield lines on label noise, and on WebVision's labels against its queries."""
    if config.noise.rate:
        wrong = noise.wrong_labels(splits.train)
        yield f"label noise: {config.noise.kind}, {len(wrong)} of {len(splits.train)} training labels are wrong"
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


class Look(NamedTuple):
    """The number of images of a split that were opened, and the broken ones among them."""

    opened: int
    bad: list[BadImage]


def _look(config: Any, split: str, images: Images, count: int) -> Look:
    """Open images of a split, print their sizes and channel statistics, and return the broken ones."""
    chosen = np.linspace(0, len(images) - 1, min(count or len(images), len(images))).round().astype(int)
    transform = eval_transform(config)
    bad, sizes, sums = [], [], np.zeros((3, 2))
    for index in chosen:
        try:
            image = images.open_image(int(index))
        except BadImage as problem:
            bad.append(problem)
            continue
        sizes.append(image.size)
        pixels = np.asarray(transform.crop(image)).reshape(3, -1) / 255
        sums += np.stack([pixels.mean(1), np.square(pixels).mean(1)], 1)
    good = len(chosen) - len(bad)
    rest = f" (of {len(images)}; --images 0 opens all)" if len(chosen) < len(images) else ""
    print(f"{split}: {good} of {len(chosen)} opened images are good{rest}")
    for problem in bad[:SHOWN]:
        print(f"  broken: {problem.name} ({problem.reason})")
    if len(bad) > SHOWN:
        print(f"  and {len(bad) - SHOWN} more")
    if good:
        sides = np.array(sizes)
        low, middle, high = sides.min(0), np.median(sides, 0), sides.max(0)
        print(f"  width x height from {_size(low)} over {_size(middle)} to {_size(high)}")
        mean = sums[:, 0] / good
        std = np.sqrt(sums[:, 1] / good - mean**2)
        off = np.abs(mean - config.mean).max() > OFF_MEAN or (np.abs(std / config.std - 1) > OFF_STD).any()
        print(
            f"  mean {_numbers(mean)} (in use {_numbers(config.mean)}), std {_numbers(std)} (in use "
            f"{_numbers(config.std)})" + ("; far from each other" if off else "")
        )
    return Look(len(chosen), bad)


def _size(side: np.ndarray) -> str:
    return f"{side[0]:.0f} x {side[1]:.0f}"


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{value:.3f}" for value in values)


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
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4), ROWS * (TILE + CAPTION + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, index in enumerate(np.linspace(0, len(dataset) - 1, ROWS * COLUMNS).round().astype(int)):
        pixels, label, clean = dataset[0, int(index)]
        left, top = place % COLUMNS * (TILE + 4), place // COLUMNS * (TILE + CAPTION + 4)
        sheet.paste(Image.fromarray(pixels.numpy()).resize((TILE, TILE)), (left, top))
        name = classes[label] if label == clean else f"{classes[label]} (is {classes[clean]})"
        while font.getlength(name) > TILE:
            name = name[:-2] + "…"
        pen.text((left + 2, top + TILE + 2), name, fill="black" if label == clean else "firebrick", font=font)
    return sheet
