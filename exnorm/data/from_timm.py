"""Data sets that timm reads: `data.source=hfds/NAME`, from Hugging Face's package `datasets`.

`data.root` is the folder in which the package keeps its files. A stream (`hfids/`, `tfds/`, `torch/`) is refused: it
cannot open image i, so a run could not resume.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import files
from exnorm.data.paths import excluded_lines
from exnorm.data.splits import NO_IMAGES, Images, Splits

STREAMS = ("hfids", "tfds", "torch")
COLUMNS = (("image", "label"), ("jpg", "cls"))  # the second pair is that of WebDataset's repositories
SPLITS = {"train": "train", "val": "validation"}


def is_named(source: str | None) -> bool:
    """Return whether timm reads a source; raise UserError for a stream."""
    kind = (source or "").partition("/")[0]
    if kind in STREAMS:
        raise UserError(f"data.source={source} is a stream, so a run cannot resume. Allowed: hfds/NAME, tar, wds")
    return kind == "hfds"


def fingerprint(config: Any) -> str:
    """Return a hash of the source's name and of the excluded images; the package checks its own files.

    Raises:
        UserError: an option is set that this source does not have.
    """
    for option in ("train_list", "val_list"):
        if config[option] is not None:
            raise UserError(f"data.{option}: data.source={config.source} has its own lists. Leave data.{option} out")
    if config.cache:
        raise UserError(f"data.cache=true: data.source={config.source} has its own files. Leave data.cache out")
    excluded = sorted(excluded_lines(config, Path()))
    return hashlib.sha256(f"{config.source} {excluded}".encode()).hexdigest()


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits, `train` and `validation`.

    Raises:
        UserError: the package `datasets` is missing or does not have this set, or the set has other columns.
    """
    readers = {split: _reader(config, split) for split in (("train", "val") if train else ("val",))}
    images = {split: _images(reader, config, split) for split, reader in readers.items()}
    index_of = readers["val"].class_to_idx
    largest = max(int(max(part.labels)) for part in images.values())
    classes = sorted(index_of, key=index_of.__getitem__) or [str(label) for label in range(largest + 1)]
    return Splits(images.get("train", NO_IMAGES), images["val"], classes)


def _reader(config: Any, split: str) -> Any:
    from timm.data.readers import create_reader

    problems = []
    for image, label in COLUMNS:
        try:
            return create_reader(
                config.source, root=config.root, split=SPLITS[split], input_key=image, target_key=label
            )
        except ImportError:
            raise UserError(f"data.source={config.source} needs a package. Type pip install datasets") from None
        except (OSError, ValueError, RuntimeError, KeyError) as problem:
            problems.append(" ".join(str(problem).split()))
    raise UserError(
        f"data.source={config.source}: cannot read split {SPLITS[split]} with columns image and label: {problems[0]}"
    )


def _images(reader: Any, config: Any, split: str) -> Images:
    labels = np.array(list(reader.iter_targets()), np.int32)
    excluded = excluded_lines(config, Path())
    names = [_name(split, place) for place in range(len(labels))]
    kept = np.array([place for place, name in enumerate(names) if name.encode() not in excluded], np.int64)
    return Images(labels[kept], partial(_open, reader, split, kept), excluded=len(labels) - len(kept))


def _name(split: str, place: int) -> str:
    """Return the name of an image in `data.exclude` and `bad_images.csv`."""
    return f"{SPLITS[split]}/{place}"


def _open(reader: Any, split: str, kept: np.ndarray, index: int) -> Image.Image:
    place = int(kept[index])
    return files.opened(_name(split, place), lambda: reader[place][0])
