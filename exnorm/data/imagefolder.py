"""A folder of images in ImageNet's layout: `train/<class>/<image>` and `val/<class>/<image>`.

Classes are the sorted names of the folders in `train/`; those of `val/` must be among them. Instead of folders there
may be list files (`data.train_list`, `data.val_list`: lines `path label`, paths from the root or from `train/` and
`val/`), or tar files (`data.source=tar`: the `*.tar` in `train/` and `val/`, or those whose name contains the word).
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import files, index
from exnorm.data.paths import excluded_lines, excluded_mask, file_of, paths_of, root_of
from exnorm.data.sample_index import SampleIndex
from exnorm.data.splits import NO_IMAGES, Images, Splits

LAYOUT = "expected DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, as in data.root=DIR"
SOURCES = ("tar", "wds")
TRIED = 20  # files of a list, to see which folder it begins in
Found = dict[str, SampleIndex]  # by split


def fingerprint(config: Any, *, train: bool = True) -> str:
    """The hash of the sorted relative paths, labels and sizes of all images."""
    root = root_of(config, layout=LAYOUT)
    return fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """List both splits; images are opened one by one."""
    root = root_of(config, layout=LAYOUT)
    both = found(config, root, train=train)
    names = class_names(naming_split(config, root, both))
    return splits(config, root, named(both, names, root), names)


def found(config: Any, root: Path, *, train: bool) -> Found:
    """The files of both splits, or without `train` of validation alone.

    Raises:
        UserError: a folder, list or tar file is not there or is none.
    """
    if config.source not in (None, *SOURCES):
        raise UserError(
            f"data.source={config.source}: {config.name} reads {', '.join(SOURCES)}, and without it folders and lists"
        )
    wanted = ("train", "val") if train else ("val",)
    both = {split: entries(config, root, split) for split in wanted}
    if config.train_list is not None and train and both["val"].numbered and not both["train"].numbered:
        raise UserError(
            f"{root}: labels are names in {config.train_list} and numbers in validation, which could be any"
        )
    return both


def naming_split(config: Any, root: Path, both: Found) -> SampleIndex:
    """The split whose classes have names: that of training, where it is there or validation has numbers alone."""
    there = config.train_list is not None or (root / "train").is_dir()
    if "train" not in both and both["val"].numbered and there:
        return entries(config, root, "train")
    return both.get("train", both["val"])


def entries(config: Any, root: Path, split: str) -> SampleIndex:
    """The files of a split, from its list, its tar files or its folder."""
    listed = config[f"{split}_list"]
    if listed is not None:
        return from_list(file_of(listed, root, f"data.{split}_list"), root, split)
    if config.source is not None:
        tars = sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{split}*.tar"))
        if not tars:
            raise UserError(f"data.source={config.source}: no tar files in {root}/{split}, and no {root}/*{split}*.tar")
        return index.of_tars(tars, tars[0].parent)
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}; {LAYOUT}")
    return index.of_folders(root / split)


def from_list(file: Path, root: Path, split: str) -> SampleIndex:
    """The files in a list, whose paths begin in the folder of the split or in the root."""
    listed = index.of_list(file, root / split)
    firsts = [listed.names[place] for place in range(min(TRIED, len(listed)))]
    for base in (root / split, root):
        if any((base / name).exists() for name in firsts):
            return replace(listed, base=str(base))
    raise UserError(f"{file}: the first files in it are neither in {root} nor in {root / split}, such as {firsts[0]}")


def named(both: Found, names: list[str], root: Path) -> Found:
    """Both splits, those with numbers for labels with the names of the classes.

    A number is a class's name where training has class folders that are named so, else its place among the classes.
    """
    if "train" in both and not both["train"].numbered and all(name.isdecimal() for name in names):
        return both
    return {
        split: part.named(names, source=f"{root}: {split}") if part.numbered else part for split, part in both.items()
    }


def class_names(part: SampleIndex) -> list[str]:
    """The names of classes; of those that are numbers the folder that holds a class's images, if there is one."""
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
    """Both splits over the same classes, without what the user excludes.

    Raises:
        UserError: a class of validation that is none of them.
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
        raise UserError(
            f"{root}: val has images of {lacking[0]} ({len(lacking)} such classes), and train has none of it"
        )
    if len(train) and train[0] > 0:
        raise UserError(
            f"{root}: train has no images of {classes[0]}, the first class; labels that are numbers count from 0"
        )


def images(config: Any, root: Path, part: SampleIndex) -> Images:
    """The images of a split without those that the user excludes."""
    excluded = excluded_mask(part, config, root)
    kept = part.where(~excluded) if excluded.any() else part
    return replace(files.images(kept, root), excluded=int(excluded.sum()))


def fingerprint_of(config: Any, root: Path, both: Found) -> str:
    """The hash of the files of both splits and of which of them are excluded.

    Raises:
        UserError: an excluded file is none of them, where no other set could have it.
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
            f"data.exclude={config.exclude}: {names[0]} is no image in {root} (of {len(names)} such lines); give paths "
            "from there, as bad_images.csv and exnorm doctor write them"
        )
    return digest.hexdigest()
