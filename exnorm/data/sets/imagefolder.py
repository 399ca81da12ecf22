"""A folder of images in ImageNet's layout: `train/<class>/<image>` and `val/<class>/<image>`.

Classes are the sorted names of the folders in `train/`; those of `val/` must be among them. Two other layouts are
possible. List files (`data.train_list`, `data.val_list`) have lines `path label`, with paths from the root or from
`train/` and `val/`. Tar files (`data.source=tar`) are `*.tar` in `train/` and `val/`, or have the split in their names.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import decoded, files, index
from exnorm.data.paths import excluded_lines, excluded_mask, file_of, paths_of, root_of
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import NO_IMAGES, Images, Splits

LAYOUT = "expected DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, as in data.root=DIR"
SOURCES = ("tar", "wds")
TRIED = 20  # files of a list; where one of them exists is the base of its paths
Found = dict[str, SampleIndex]  # by split


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths, labels and sizes of all images."""
    root = root_of(config, layout=LAYOUT)
    return fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images are opened one by one."""
    root = root_of(config, layout=LAYOUT)
    both = found(config, root, train=train)
    names = class_names(naming_split(config, root, both))
    return splits(config, root, named(both, names, root), names)


def found(config: Any, root: Path, *, train: bool) -> Found:
    """Return the files of both splits, or only those of validation without `train`.

    Raises:
        UserError: a folder, list or tar file does not exist or is invalid.
    """
    if config.source not in (None, *SOURCES):
        raise UserError(
            f"data.source={config.source}: {config.name} reads {', '.join(SOURCES)}. Leave it out for folders and lists"
        )
    wanted = ("train", "val") if train else ("val",)
    both = {split: entries(config, root, split) for split in wanted}
    if config.train_list is not None and train and both["val"].numbered and not both["train"].numbered:
        raise UserError(
            f"{root}: labels are names in {config.train_list} and numbers in validation. Use names in both, because "
            "numbers do not say which names they mean"
        )
    return both


def naming_split(config: Any, root: Path, both: Found) -> SampleIndex:
    """Return the split that gives the names of the classes.

    It is training if that is in `both`, or if it exists and validation has only numbers; otherwise it is validation.
    """
    there = config.train_list is not None or (root / "train").is_dir()
    if "train" not in both and both["val"].numbered and there:
        return entries(config, root, "train")
    return both.get("train", both["val"])


def entries(config: Any, root: Path, split: str) -> SampleIndex:
    """Return the files of a split, from its list, its tar files or its folder."""
    listed = config[f"{split}_list"]
    if listed is not None:
        return from_list(file_of(listed, root, f"data.{split}_list"), root, split)
    if config.source is not None:
        tars = sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{split}*.tar"))
        if not tars:
            raise UserError(f"data.source={config.source}: there is no {root}/{split}/*.tar or {root}/*{split}*.tar")
        return index.of_tars(tars, tars[0].parent)
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}; {LAYOUT}")
    return index.of_folders(root / split)


def from_list(file: Path, root: Path, split: str) -> SampleIndex:
    """Return the files in a list, whose paths begin in the folder of the split or in the root."""
    listed = index.of_list(file, root / split)
    firsts = [listed.names[place] for place in range(min(TRIED, len(listed)))]
    for base in (root / split, root):
        if any((base / name).exists() for name in firsts):
            return replace(listed, base=str(base))
    raise UserError(f"{file}: its first files, such as {firsts[0]}, are neither in {root} nor in {root / split}")


def named(both: Found, names: list[str], root: Path) -> Found:
    """Return both splits, with the names of the classes where labels are numbers.

    A number is the name of a class if training has class folders with such names. Otherwise it is a class's index.
    """
    if "train" in both and not both["train"].numbered and all(name.isdecimal() for name in names):
        return both
    return {
        split: part.named(names, source=f"{root}: {split}") if part.numbered else part for split, part in both.items()
    }


def class_names(part: SampleIndex) -> list[str]:
    """Return the names of classes; instead of numbers, the folders of the images if each class has its own folder."""
    names = list(part.classes)
    if not part.numbered:
        return names
    labels, firsts = np.unique(part.labels, return_index=True)
    folders = [Path(part.names[int(first)]).parent.name for first in firsts]
    if len(set(folders)) == len(names) and all(folders):
        for label, folder in zip(labels, folders, strict=True):
            names[label] = folder
    return names


def splits(config: Any, root: Path, both: Found, classes: list[str]) -> Splits:
    """Return both splits over the same classes, without the images that the user excludes.

    Raises:
        UserError: validation has a class that is not in `classes`.
    """
    parts = {split: part.labelled_as(classes, source=f"{root}: {split}") for split, part in both.items()}
    if "train" in parts:
        _check_that_train_has_all(parts, classes, root)
    train = images(config, root, parts["train"]) if "train" in parts else NO_IMAGES
    return Splits(train, images(config, root, parts["val"]), classes)


def _check_that_train_has_all(parts: Found, classes: list[str], root: Path) -> None:
    train, val = (np.unique(parts[split].labels) for split in ("train", "val"))
    lacking = [classes[label] for label in np.setdiff1d(val, train)]
    if lacking:
        raise UserError(f"{root}: val has images of {lacking[0]} ({len(lacking)} such classes), but train has none")
    if len(train) and train[0] > 0:
        raise UserError(
            f"{root}: train has no images of {classes[0]}, the first class. Labels that are numbers must count from 0"
        )


def images(config: Any, root: Path, part: SampleIndex) -> Images:
    """Return the images of a split without those that the user excludes."""
    excluded = excluded_mask(part, config, root)
    kept = part.where(~excluded) if excluded.any() else part
    found = replace(files.images(kept, root), excluded=int(excluded.sum()))
    return decoded.cached(found, kept, config.cache)


def fingerprint_of(config: Any, root: Path, both: Found) -> str:
    """Return a hash of the files of both splits and of the exclusions among them.

    Raises:
        UserError: an excluded file is in neither split, and there is no other data set that could have it.
    """
    digest = hashlib.sha256()
    missed = excluded_lines(config, root)
    for split, part in sorted(both.items()):
        excluded = excluded_mask(part, config, root)
        digest.update(f"{split} {part.fingerprint()} {np.flatnonzero(excluded).tolist()}\n".encode())
        missed -= paths_of(part.where(excluded), root)
        if excluded.all():
            raise UserError(f"data.exclude={config.exclude} leaves no images for {split}")
    if missed and "train" in both and not config.val:
        names = sorted(os.fsdecode(line) for line in missed if not line.startswith(b"/"))
        raise UserError(
            f"data.exclude={config.exclude}: {names[0]} is not an image in {root} (of {len(names)} such lines). Give "
            "paths from this folder, as bad_images.csv and exnorm doctor write them"
        )
    return digest.hexdigest()
