"""Find images and their masks: two folders with files of the same names, or a list file with two paths on each line.

The scans of folders and lists are kept in the cache, as those of `exnorm.data.index`.
"""

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data import index
from exnorm.data.files import name_of
from exnorm.data.packed import Packed
from exnorm.data.paths import excluded_lines, excluded_mask, paths_of
from exnorm.data.sample_index import SampleIndex

SHOWN = 3
TRIED = 20  # lines of a list; where one of their images exists is the base of its paths
REPAIR = "Add the missing files, or list these images in a file and type data.exclude=FILE"


class Unpaired(UserError):
    """Images have no mask, or masks have no image. `problems` are paths relative to the root, and what each lacks."""

    def __init__(self, text: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.problems = problems


@dataclass(frozen=True)
class Pairs:
    """Images and their masks, in the same order, without those that the user excludes.

    Attributes:
        excluded: the number of images that were left out.
        excluded_paths: the paths of the files that were left out, relative to the root and absolute.
    """

    images: SampleIndex
    masks: SampleIndex
    excluded: int
    excluded_paths: frozenset[bytes]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Ends:
    """The ends of the names of an image and its mask, which begin alike. None is the suffix of any image."""

    image: str | None = None
    mask: str = ".png"


def of_splits(folders: Mapping[str, str], find: Callable[[str], Pairs], *, train: bool) -> dict[str, Pairs]:
    """Return what `find` finds in the folder of each split.

    Args:
        folders: by the names of the splits, train and val.
        train: False leaves out the folder of training.

    Raises:
        Unpaired: with the problems of all splits.
    """
    found, failed = {}, []
    for split, folder in folders.items():
        if split == "train" and not train:
            continue
        try:
            found[split] = find(folder)
        except Unpaired as problem:
            failed.append(problem)
    if failed:
        raise Unpaired(". ".join(map(str, failed)) + f". {REPAIR}", [item for each in failed for item in each.problems])
    return found


def tree(folder: Path, end: str | None, *, layout: str) -> SampleIndex:
    """Return the files in a folder and below whose names have this end, sorted.

    Raises:
        UserError: there is no such folder or file.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {layout}")
    files = index.of_tree(folder)
    if end is None:
        return files
    wanted = np.array([_key(files, place, end) is not None for place in range(len(files))])
    if not wanted.any():
        raise UserError(f"{folder} has no files *{end}; {layout}")
    return files if wanted.all() else files.where(wanted)


def _key(files: SampleIndex, place: int, end: str | None) -> bytes | None:
    """Return the name of a file without its end; None if it has another end."""
    name = files.names.raw(place)
    if end is None:
        return name.rpartition(b".")[0]
    return name[: -len(end)] if name.lower().endswith(end.lower().encode()) else None


def keys(files: SampleIndex, end: str | None, root: Path) -> list[bytes]:
    """Return the names of files without their ends.

    Raises:
        UserError: two files have the same name.
    """
    found: dict[bytes, int] = {}
    for place in range(len(files)):
        first = found.setdefault(_key(files, place, end) or b"", place)
        if first != place:
            both = " and ".join(name_of(files, root, number) for number in (first, place))
            raise UserError(f"{root}: {both} have the same name without their ends, so masks do not tell them apart")
    return list(found)


def matched(config: Any, root: Path, images: SampleIndex, masks: SampleIndex, ends: Ends) -> Pairs:
    """Return the images with the masks of the same names, without those whose image or mask the user excludes.

    Raises:
        Unpaired: an image has no mask, or a mask has no image, and the user does not exclude it.
    """
    image_keys, mask_keys = keys(images, ends.image, root), keys(masks, ends.mask, root)
    left_out, masks_left_out = excluded_mask(images, config, root), excluded_mask(masks, config, root)
    places = {key: place for place, key in enumerate(mask_keys)}
    order = np.array([places.get(key, -1) for key in image_keys])
    there = order >= 0
    orphans = np.ones(len(masks), bool)
    orphans[order[there]] = False
    _check_pairs(root, images, ~there & ~left_out, masks, orphans & ~masks_left_out, ends)
    left_out[there] |= masks_left_out[order[there]]
    paths = paths_of(images.where(left_out), root) | paths_of(masks.where(masks_left_out), root)
    return Pairs(images.where(~left_out), _taken(masks, order[~left_out]), int(left_out.sum()), frozenset(paths))


def _check_pairs(
    root: Path, images: SampleIndex, alone: np.ndarray, masks: SampleIndex, orphans: np.ndarray, ends: Ends
) -> None:
    texts, problems = [], []
    for files, these, lacks in ((images, alone, "mask"), (masks, orphans, "image")):
        lonely = [name_of(files, root, int(place)) for place in np.flatnonzero(these)]
        problems += [(name, f"it has no {lacks}") for name in lonely]
        if lonely:
            folder, kind = os.path.relpath(files.base, root), "images" if lacks == "mask" else "masks"
            listed = ", ".join(lonely[:SHOWN]) + (" ..." if len(lonely) > SHOWN else "")
            texts.append(f"{len(lonely)} of the {len(files)} {kind} in {folder}/ have no {lacks}: {listed}")
    if alone.any():
        key = os.fsdecode(_key(images, int(np.flatnonzero(alone)[0]), ends.image) or b"")
        texts[0] += f" (expected {os.path.relpath(os.path.join(masks.base, key + ends.mask), root)})"
    if problems:
        raise Unpaired(f"{root}: {'; '.join(texts)}", problems)


def _taken(files: SampleIndex, order: np.ndarray) -> SampleIndex:
    """Return files in another order."""
    names = Packed.of(files.names.raw(int(place)) for place in order)
    stamps = None if files.stamps is None else files.stamps[order]
    return replace(files, names=names, labels=files.labels[order], stamps=stamps)


def of_list(config: Any, root: Path, file: Path, split: str) -> Pairs:
    """Return the images and masks in a list file, which has a line `image mask` for each pair.

    The paths are relative to the root or to the folder of the split. An image's path may have spaces. If that of a mask
    has some, too, a tab must be between the two.

    Raises:
        UserError: a line is invalid, or there are no lines.
        Unpaired: listed files do not exist, and the user does not exclude them.
    """
    base = _base_of(file, root, split)
    images, masks = (
        index.kept(f"{kind}s of pairs in {base.absolute()}", file, partial(_scan_column, file, base, column))
        for column, kind in enumerate(("image", "mask"))
    )
    left_out = excluded_mask(images, config, root) | excluded_mask(masks, config, root)
    texts, problems = [], []
    for files, kind in ((images, "images"), (masks, "masks")):
        assert files.stamps is not None
        gone = [name_of(files, root, int(place)) for place in np.flatnonzero((files.stamps[:, 0] < 0) & ~left_out)]
        problems += [(name, "it does not exist") for name in gone]
        if gone:
            texts.append(f"{len(gone)} of the {len(files)} {kind} do not exist, such as {gone[0]}")
    if problems:
        raise Unpaired(f"{file}: {'; '.join(texts)}", problems)
    paths = paths_of(images.where(left_out), root) | paths_of(masks.where(left_out), root)
    return Pairs(images.where(~left_out), masks.where(~left_out), int(left_out.sum()), frozenset(paths))


def _base_of(file: Path, root: Path, split: str) -> Path:
    first = [os.fsdecode(image) for _, (image, _) in zip(range(TRIED), _lines(file), strict=False)]
    for base in (root / split, root):
        if any((base / name).exists() for name in first):
            return base
    if not first:
        raise UserError(f"{file} is empty: expected a line 'image mask' for each pair")
    raise UserError(f"{file}: its first images, such as {first[0]}, are neither in {root} nor in {root / split}")


def _scan_column(file: Path, base: Path, column: int) -> index.Found:
    names = [pair[column] for pair in _lines(file)]
    paths = [os.path.join(os.fsencode(base), name) for name in names]
    stamps = np.array([index.stamp_of(path) for path in paths], np.int64)
    entries = SampleIndex(Packed.of(names), np.zeros(len(names), np.int32), [], str(base), stamps=stamps)
    return index.Found(entries, [os.fsencode(file), *sorted({os.path.dirname(path) for path in paths})])


def _lines(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two paths on each line of a list; empty lines do not count."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            parts = [part.strip() for part in text.split(b"\t")] if b"\t" in text else text.rsplit(None, 1)
            if len(parts) not in (0, 2):
                raise UserError(f"{file}, line {number}: expected 'image mask', found '{os.fsdecode(text)}'")
            if parts:
                yield os.path.normpath(parts[0]), os.path.normpath(parts[1])


def fingerprint_of(config: Any, root: Path, both: dict[str, Pairs], classes: Sequence[str] = ()) -> str:
    """Return a hash of the paths and sizes of the images and masks of all splits, and of the names of the classes.

    Raises:
        UserError: all images of a split are excluded, or an excluded file does not exist and there is no other data set
            that could have it.
    """
    digest = hashlib.sha256("\n".join(classes).encode())
    missed = excluded_lines(config, root)
    for split, pairs in sorted(both.items()):
        if not len(pairs):
            raise UserError(f"data.exclude={config.exclude} leaves no images for {split}")
        digest.update(f"{split} {pairs.images.fingerprint()} {pairs.masks.fingerprint()} {pairs.excluded}\n".encode())
        missed -= pairs.excluded_paths
    if missed and "train" in both and not config.val:
        names = sorted(os.fsdecode(line) for line in missed if not line.startswith(b"/"))
        lost = [name for name in names if not (root / name).is_file()]  # a file of another split is none of them
        if lost:
            raise UserError(
                f"data.exclude={config.exclude}: {lost[0]} is not a file in {root} (of {len(lost)} such lines). Give "
                "paths from this folder, as bad_images.csv and exnorm doctor write them"
            )
    return digest.hexdigest()
