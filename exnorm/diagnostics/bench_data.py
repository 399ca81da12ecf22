"""`exnorm bench data`: measure the speed of the loader, and the time to index ImageNet's 1.3 million files.

The loader and its parts are compared with torchvision's ImageFolder in a bare DataLoader with the same transforms.
Without a data set, photographs are generated: JPEG files of 500 x 375 pixels and 66 KB, noise over a coarse pattern.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from exnorm.config.compose import compose_train
from exnorm.data import fingerprint, load
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.transforms import Transform, train_transform
from exnorm.diagnostics.bench import TABLES, append, interleaved, print_rows, ratios
from exnorm.runs.subprocesses import importing_environment

BATCH = 64
ENTRIES = 1_281_167  # ImageNet's training images
CPU = torch.device("cpu")


def run(overrides: list[str], images: int, rounds: int, folder: Path = TABLES) -> None:
    """Measure a data set and the index of a list file. Print both and append them to `data.csv` and `index.csv`."""
    with _root(overrides, images) as given:
        rows = [measure(compose_train(given).data, images, rounds)]
    print_rows("images per second", rows)
    append(folder / "data.csv", rows, device=CPU)
    index = [measure_index(ENTRIES)]
    print_rows("the index of a list file", index)
    append(folder / "index.csv", index, device=CPU)


@contextmanager
def _root(overrides: list[str], images: int) -> Iterator[list[str]]:
    """Yield the overrides; without a data set, those of a folder with generated photographs."""
    if any(word.startswith("data=") for word in overrides):
        yield overrides
        return
    with tempfile.TemporaryDirectory() as name:
        draw = random.Random(0)
        for number in range(images):
            split = "val" if number < 4 else "train"
            path = Path(name) / split / f"class{number % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(draw).save(path, quality=92)
        yield ["data=imagefolder", f"data.root={name}", *overrides]


def photograph(draw: random.Random) -> Image.Image:
    """Return 500 x 375 pixels that are as hard to decode as an image of ImageNet of that size."""
    coarse = Image.frombytes("RGB", (32, 24), draw.randbytes(32 * 24 * 3)).resize((500, 375), Image.Resampling.BICUBIC)
    noise = np.frombuffer(draw.randbytes(500 * 375 * 3), np.uint8).reshape(375, 500, 3)
    pixels = np.asarray(coarse) * np.float32(0.85) + noise * np.float32(0.15)
    return Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def measure(config: Any, count: int, rounds: int) -> dict[str, Any]:
    """Return a row of speeds, measured in turn: the loader, decoding alone, augmentation alone, and the bare loader."""
    fingerprint(config)
    images = load(config).train
    count = min(count, len(images)) // BATCH * BATCH or len(images)
    transform = train_transform(config)
    batches = TrainBatches(count, total=min(BATCH, count), seed=0)
    loader = Loader(SeededImages(images, transform, seed=0), batches, workers=config.workers, device=CPU)
    workers = loader.batches.num_workers
    opened = [images.open_image(index) for index in range(min(count, BATCH))]
    candidates: dict[str, Callable[[], Any]] = {
        "loader": lambda: _drain(loader),
        "decode": lambda: [images.open_image(index) for index in range(count)],
        "augment": lambda: [transform.crop(opened[index % len(opened)]) for index in range(count)],
    }
    bare = _bare(config, transform, count, workers)
    if bare is not None:
        candidates["bare"] = lambda: _drain(bare)
    seconds = interleaved(candidates, rounds)
    speed = {name: round(count / sorted(values)[rounds // 2], 1) for name, values in seconds.items()}
    row: dict[str, Any] = {"data": config.name, "image_size": config.image_size, "images": count, "workers": workers}
    row |= {"rounds": rounds, "loader": speed["loader"], "bare_image_folder": speed.get("bare", "")}
    row |= ratios(seconds["bare"], seconds["loader"]) if bare is not None else dict.fromkeys(ratios([1], [1]), "")
    return row | {"decode": speed["decode"], "augment": speed["augment"]}


def _drain(loader: Any) -> None:
    for _ in loader:
        pass


def _bare(config: Any, transform: Transform, count: int, workers: int) -> DataLoader[Any] | None:
    """Return the loader that a user without exnorm would write; None for a data set that ImageFolder cannot read."""
    folder = Path(config.root or "/nonexistent") / "train"
    if not folder.is_dir() or config.source is not None or config.train_list is not None:
        return None
    whole = transforms.Compose(
        [
            transform.crop,
            torch.as_tensor,
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    return DataLoader(
        Subset(datasets.ImageFolder(str(folder), whole), range(count)),
        batch_size=min(BATCH, count),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def measure_index(entries: int) -> dict[str, Any]:
    """Return a row: seconds to read a list file of that many images, first and again, and the memory. Linux only."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for split, count in (("train", entries), ("val", max(1, entries // 25))):
            labels = (number % 1000 for number in range(count))
            lines = (f"n{label:08}/n{label:08}_{number}.JPEG {label}\n" for number, label in enumerate(labels))
            (root / f"{split}.txt").write_text("".join(lines))
            os.utime(root / f"{split}.txt", (0, 0))  # as old as a list usually is
            first = root / split / "n00000000" / "n00000000_0.JPEG"
            first.parent.mkdir(parents=True)
            first.touch()
        environment = importing_environment() | {"XDG_CACHE_HOME": name}
        command = [sys.executable, "-c", STARTUP, name]
        first, again = (
            json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    return {"entries": entries, "first_s": first["s"], "again_s": again["s"], "mib_above_imports": first["mib"]}


# The work on the data at the start of a run: the controller's fingerprint, then a worker's list. Runs as a subprocess.
STARTUP = """
import json, sys, time
import timm.data, exnorm.data.sets.imagefolder
from exnorm.config.compose import compose_train
from exnorm.data import fingerprint, load
config = compose_train(["data=imagefolder", f"data.root={sys.argv[1]}", "data.train_list=train.txt",
                        "data.val_list=val.txt"]).data
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, start = kib("VmRSS"), time.perf_counter()
fingerprint(config)
assert len(load(config).train) > 0
s = time.perf_counter() - start
print(json.dumps({"s": round(s, 2), "mib": round((kib("VmHWM") - before) / 1024, 1)}))
"""
