"""Finding the files of a split, in folders of classes, list files or tar files; what was found is kept in the cache.

A scan of ImageNet's 1.3 million files takes seconds on a local disk and minutes on a network's. So it is kept, with the
time of change of every folder and file that it read: a file that is added, removed or renamed changes its folder's.
"""

import hashlib
import json
import os
import tarfile
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data.entries import Entries
from exnorm.data.packed import Packed
from exnorm.runs.cache import building_in, cache_folder

VERSION = 1
SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".gif", b".tif", b".tiff", b".webp", b".ppm")
SETTLED_S = 2  # a folder that changed this lately may change again without a new time stamp
ARRAYS = ("labels", "sizes", "spans")


class Found(NamedTuple):
    """The result of a scan, and the folders and files whose change makes it stale."""

    entries: Entries
    watched: list[bytes]


def of_folders(folder: Path) -> Entries:
    """`<class>/**/<image>`, sorted; the classes are the sorted names of the folders.

    Raises:
        UserError: no class folders, or one without images.
    """
    return _kept("folders", folder, lambda: _scan_folders(folder))


def of_list(file: Path, base: Path) -> Entries:
    """A list file with a line `path label` for each image, paths relative to `base`.

    Labels that are all numbers are kept as they are, with the classes "0", "1", ...; others are names of classes.

    Raises:
        UserError: a line that is none, with its number; no lines at all.
    """
    found = _kept("list", file, lambda: _scan_list(file))
    return Entries(found.names, found.labels, found.classes, str(base))


def of_tars(files: Sequence[Path], base: Path) -> Entries:
    """The images in tar files; labelled by a member of the same name with the suffix `.cls`, as in WebDataset's shards,
    or else by the folder that they are in, or else by the name of the tar file.

    Raises:
        UserError: a file that is no tar file, or is compressed, or none with images.
    """
    key = base / "\n".join(file.name for file in files)
    return _kept("tars", key, lambda: _scan_tars(files, base))


def _kept(kind: str, path: Path, scan: Callable[[], Found]) -> Entries:
    """What a scan found, from the cache if nothing that it read has changed."""
    name = hashlib.sha256(f"{VERSION}/{kind}/{path.absolute()}".encode(errors="surrogateescape")).hexdigest()
    file = cache_folder() / f"index-{name[:24]}.npz"
    kept = _read(file)
    if kept is not None:
        return kept
    start = time.time()
    found = scan()
    stamps = _stamps(found.watched)
    if stamps is not None and max(changed for _, changed, _ in stamps) < (start - SETTLED_S) * 1e9:
        _write(file, found.entries, stamps)
    return found.entries


Stamp = tuple[str, int, int]  # path, time of change in ns, bytes


def _stamps(paths: Sequence[bytes]) -> list[Stamp] | None:
    try:
        found = [(path, os.stat(path)) for path in paths]
    except OSError:
        return None
    return [(os.fsdecode(path), stat.st_mtime_ns, stat.st_size) for path, stat in found]


def _read(file: Path) -> Entries | None:
    """Kept entries; None where there are none, or something has changed, or the file is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            facts: dict[str, Any] = json.loads(stored["facts"].tobytes())
            stamps = [tuple(stamp) for stamp in facts["stamps"]]
            if _stamps([os.fsencode(path) for path, _, _ in stamps]) != stamps:
                return None
            arrays = {name: stored[name] for name in ARRAYS if name in stored}
            names = Packed(stored["block"], stored["ends"])
            return Entries(names, classes=facts["classes"], base=facts["base"], tars=facts["tars"], **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: Path, entries: Entries, stamps: list[Stamp]) -> None:
    facts = {"classes": list(entries.classes), "base": entries.base, "tars": list(entries.tars), "stamps": stamps}
    arrays = {name: value for name in ARRAYS if (value := getattr(entries, name)) is not None}
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with building_in(file) as part, part.open("wb") as target:
        np.savez(target, facts=text, block=entries.names.block, ends=entries.names.ends, **arrays)


def _scan_folders(folder: Path) -> Found:
    base = os.fsencode(folder)
    watched = [base]
    classes = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith(b"."))
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/<class>/*.jpg")
    names, sizes, counts = [], array("q"), []
    for name in classes:
        files = sorted(_images_below(base, name, watched))
        if not files:
            empty, endings = os.fsdecode(os.path.join(base, name)), b", ".join(SUFFIXES).decode()
            raise UserError(f"class folder {empty} has no images ({endings}); remove it or fill it")
        names.append(Packed.of(path for path, _ in files))
        sizes.extend(size for _, size in files)
        counts.append(len(files))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    entries = Entries(_joined(names), labels, list(map(os.fsdecode, classes)), str(folder), np.array(sizes))
    return Found(entries, watched)


def _joined(parts: list[Packed]) -> Packed:
    starts = np.cumsum([0, *(len(part.block) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    return Packed(np.concatenate([part.block for part in parts]), np.concatenate(ends))


def _images_below(base: bytes, folder: bytes, watched: list[bytes]) -> Iterator[tuple[bytes, int]]:
    """(path relative to base, bytes) of the images in a folder and its folders; -1 bytes for a dangling link."""
    watched.append(os.path.join(base, folder))
    for entry in os.scandir(watched[-1]):
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            yield from _images_below(base, path, watched)
        elif _is_image(entry.name):
            try:
                yield path, entry.stat().st_size
            except OSError:
                yield path, -1


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(b".")


def _scan_list(file: Path) -> Found:
    ids: dict[bytes, int] = {}
    labels = array("i")

    def read(lines: BinaryIO) -> Iterator[bytes]:
        for number, line in enumerate(lines, 1):
            parts = line.rsplit(None, 1)
            if len(parts) == 2:
                labels.append(ids.setdefault(parts[1], len(ids)))
                yield parts[0]
            elif parts:
                raise UserError(f"{file}, line {number}: expected 'path label', found '{os.fsdecode(line).strip()}'")

    with file.open("rb") as lines:
        names = Packed.of(read(lines))
    if not labels:
        raise UserError(f"{file} is empty: expected a line 'path label' for each image")
    if all(label.isdigit() for label in ids):
        numbers = np.array([int(label) for label in ids], np.int32)
        classes = [str(number) for number in range(int(numbers.max()) + 1)]
    else:
        classes = sorted(map(os.fsdecode, ids))
        places = {name: place for place, name in enumerate(classes)}
        numbers = np.array([places[os.fsdecode(label)] for label in ids], np.int32)
    return Found(Entries(names, numbers[np.array(labels)], classes, ""), [os.fsencode(file)])


class _Member(NamedTuple):
    name: str
    label: str
    span: tuple[int, int, int]


def _scan_tars(files: Sequence[Path], base: Path) -> Found:
    members = [member for number, file in enumerate(files) for member in _members(file, number)]
    if not members:
        raise UserError(f"no images in {', '.join(map(str, files[:3]))}{' ...' if len(files) > 3 else ''}")
    members.sort(key=lambda member: (member.span[0], member.name))
    numeric = all(member.label.isdigit() for member in members)
    if numeric:
        numbers = [int(member.label) for member in members]
        classes = [str(number) for number in range(max(numbers) + 1)]
    else:
        classes = sorted({member.label for member in members})
        places = {name: place for place, name in enumerate(classes)}
        numbers = [places[member.label] for member in members]
    entries = Entries(
        Packed.of(os.fsencode(f"{files[member.span[0]].name}/{member.name}") for member in members),
        np.array(numbers, np.int32),
        classes,
        str(base),
        spans=np.array([member.span for member in members], np.int64),
        tars=[str(file) for file in files],
    )
    return Found(entries, [os.fsencode(file) for file in files])


def _members(file: Path, number: int) -> Iterator[_Member]:
    """The images of a tar file with their labels and where they lie in it."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                key, _, suffix = info.name.rpartition(".")
                content = tar.extractfile(info) if info.isfile() and suffix == "cls" else None
                if content is not None:
                    labels[key] = content.read().decode().strip()
                elif info.isfile() and _is_image(os.fsencode(os.path.basename(info.name))):
                    images[key] = info
    except (tarfile.TarError, OSError) as problem:
        raise UserError(f"{file} is no uncompressed tar file ({problem}); images need no compression") from None
    for key, info in images.items():
        label = labels.get(key) or os.path.basename(os.path.dirname(info.name)) or file.stem
        yield _Member(info.name, label, (number, info.offset_data, info.size))
