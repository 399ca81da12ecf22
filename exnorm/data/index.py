"""Find the files of a split, in class folders, list files or tar files. The result is kept in the cache.

A scan of ImageNet's 1.3 million files takes seconds on a local disk and minutes on a network file system. So its result
is kept, with the modification time of every folder and list that it read. A file that is added, removed or renamed
changes the time of its folder. Files that were rewritten under their old names are detected by a sample of their sizes
and times.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import tarfile
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data.packed import Packed
from exnorm.data.sample_index import SampleIndex
from exnorm.runs.cache import building_in, cache_folder

VERSION = 3
SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".gif", b".tif", b".tiff", b".webp", b".ppm")
SAMPLE = 256  # files whose sizes and times are compared with the kept ones
MAX_LABEL = 1_000_000
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
WHOLE = re.compile(r"\d+")
SETTLED_S = 2  # a folder or a file that changed this lately may change again without a new time stamp
ARRAYS = ("labels", "stamps", "spans")


class Found(NamedTuple):
    """The result of a scan, and the folders and files that make it outdated when they change."""

    entries: SampleIndex
    watched: list[bytes]


def of_folders(folder: Path) -> SampleIndex:
    """Return the images `<class>/**/<image>`, sorted; the classes are the sorted names of the folders.

    Raises:
        UserError: there are less than two class folders, or one has no images.
    """
    return kept("folders", folder, lambda: _scan_folders(folder))


def of_tree(folder: Path) -> SampleIndex:
    """Return all images in a folder and below, sorted; they have no classes.

    Raises:
        UserError: there are no images.
    """
    return kept("tree", folder, lambda: _scan_tree(folder))


def of_list(file: Path, base: Path) -> SampleIndex:
    """Return the images of a list file with a line `path label` for each image; paths are relative to `base`.

    If all labels are numbers, they stay numbers, with the classes "0", "1", ...; otherwise they are names of classes.

    Raises:
        UserError: a line is invalid (the message gives its number), or there are no lines.
    """
    found = kept("list", file, lambda: _scan_list(file))
    return replace(found, base=str(base))


def of_tars(files: Sequence[Path], base: Path) -> SampleIndex:
    """Return the images in tar files.

    The label of an image is in a member of the same name with the suffix `.cls`, as in WebDataset's shards. Without
    such members it is the folder of the image, or else the name of the tar file.

    Raises:
        UserError: a file is not a tar file or is compressed, or there are no images.
    """
    key = base / "\n".join(file.name for file in files)
    return kept("tars", key, lambda: _scan_tars(files, base))


def kept(kind: str, path: Path, scan: Callable[[], Found]) -> SampleIndex:
    """Return the result of a scan, from the cache if nothing that the scan read has changed."""
    name = hashlib.sha256(f"{VERSION}/{kind}/{path.absolute()}".encode(errors="surrogateescape")).hexdigest()
    file = cache_folder() / f"index-{name[:24]}.npz"
    kept = _read(file)
    if kept is not None:
        return replace(kept, kept_in=str(file))
    settled_ns = int((time.time() - SETTLED_S) * 1e9)
    found = scan()
    if found.entries.stamps is not None:
        times_ns = found.entries.stamps[:, 1]
        times_ns[times_ns >= settled_ns] = -1
    watched = _stamps(found.watched)
    if watched is not None and max(changed for _, changed, _ in watched) < settled_ns:
        with contextlib.suppress(OSError):  # a full disk: the scan is repeated next time
            _write(file, found.entries, watched)
    return replace(found.entries, kept_in=str(file))


Stamp = tuple[str, int, int]  # path, time of change in ns, bytes


def _stamps(paths: Sequence[bytes]) -> list[Stamp] | None:
    try:
        found = [(path, os.stat(path)) for path in paths]
    except OSError:
        return None
    return [(os.fsdecode(path), stat.st_mtime_ns, stat.st_size) for path, stat in found]


def _read(file: Path) -> SampleIndex | None:
    """Return kept entries; None if there are none, something has changed, or the file is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            facts: dict[str, Any] = json.loads(stored["facts"].tobytes())
            stamps = [tuple(stamp) for stamp in facts["stamps"]]
            if _stamps([os.fsencode(path) for path, _, _ in stamps]) != stamps:
                return None
            arrays = {name: stored[name] for name in ARRAYS if name in stored}
            entries = SampleIndex(Packed(stored["block"], stored["ends"]), **arrays, **facts["fields"])
            return entries if _same_stamps(entries) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _same_stamps(entries: SampleIndex) -> bool:
    if entries.stamps is None:
        return True
    places = np.linspace(0, len(entries) - 1, min(SAMPLE, len(entries))).astype(int).tolist()
    paths = (os.path.join(os.fsencode(entries.base), entries.names.raw(place)) for place in places)
    now, then = np.array([stamp_of(path) for path in paths]).reshape(-1, 2), entries.stamps[places]
    now[then[:, 1] < 0, 1] = -1
    return np.array_equal(now, then)


def stamp_of(path: bytes) -> tuple[int, int]:
    """Return the bytes of a file and its time of change in ns.

    Both are -1 for a dangling link. A time that is before 1970 or does not fit into 63 bits is -1.
    """
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns if 0 <= found.st_mtime_ns < 1 << 63 else -1


def _write(file: Path, entries: SampleIndex, stamps: list[Stamp]) -> None:
    fields = {name: getattr(entries, name) for name in ("classes", "base", "numbered", "tars")}
    facts = {"fields": fields, "stamps": stamps}
    arrays = {name: value for name in ARRAYS if (value := getattr(entries, name)) is not None}
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with building_in(file) as part, part.open("wb") as target:
        np.savez(target, facts=text, block=entries.names.block, ends=entries.names.ends, **arrays)


def _scan_folders(folder: Path) -> Found:
    base = os.fsencode(folder)
    watched = [base]
    classes = sorted(entry.name for entry in os.scandir(base) if _is_folder(entry) and not entry.name.startswith(b"."))
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/<class>/*.jpg")
    if len(classes) == 1:
        raise UserError(f"{folder} has one class folder, {os.fsdecode(classes[0])}: expected {folder}/<class>/*.jpg")
    names, stamps, counts = [], [], []
    for name in classes:
        files = sorted(_images_below(base, name, watched))
        if not files:
            empty, endings = os.fsdecode(os.path.join(base, name)), b", ".join(SUFFIXES).decode()
            raise UserError(f"class folder {empty} has no images ({endings}). Remove it or add images")
        names.append(Packed.of(path for path, _ in files))
        stamps.append(_stamps_of(files))
        counts.append(len(files))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    names_of_classes, together = list(map(os.fsdecode, classes)), np.concatenate(stamps)
    return Found(SampleIndex(_joined(names), labels, names_of_classes, str(folder), stamps=together), watched)


def _stamps_of(files: Sequence[tuple[bytes, tuple[int, int]]]) -> np.ndarray:
    return np.array([stamp for _, stamp in files], np.int64)


def _scan_tree(folder: Path) -> Found:
    watched: list[bytes] = []
    files = sorted(_images_below(os.fsencode(folder), b"", watched, above=(b"",)))  # the folder itself is not above
    if not files:
        raise UserError(f"{folder} has no images ({b', '.join(SUFFIXES).decode()})")
    names, labels = Packed.of(name for name, _ in files), np.zeros(len(files), np.int32)
    return Found(SampleIndex(names, labels, [], str(folder), stamps=_stamps_of(files)), watched)


def _joined(parts: list[Packed]) -> Packed:
    starts = np.cumsum([0, *(len(part.block) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    return Packed(np.concatenate([part.block for part in parts]), np.concatenate(ends))


def _images_below(
    base: bytes, folder: bytes, watched: list[bytes], above: tuple[bytes, ...] = ()
) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield the images in a folder and below: the path relative to base, and the result of `stamp_of`.

    Args:
        above: the real paths of the parent folders. A loop leads back to one of them; a second link to the same folder
            does not.

    Raises:
        UserError: a link leads from a folder back to itself.
    """
    path, way = os.path.join(base, folder), above or (os.path.realpath(base),)
    here = os.path.realpath(path)
    if here in way:
        raise UserError(f"{os.fsdecode(path)} is a link to a folder that contains it. Remove the link")
    watched.append(path)
    with os.scandir(path) as entries:
        found = list(entries)
    for entry in found:
        name = os.path.join(folder, entry.name)
        if _is_folder(entry):
            yield from _images_below(base, name, watched, (*way, here))
        elif is_image(entry.name):
            yield name, stamp_of(entry.path)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_image(name: bytes) -> bool:
    """Return whether a file name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(b".")


def _scan_list(file: Path) -> Found:
    numbers: dict[bytes, int] = {}  # of the labels, in the order in which they appear
    labels = array("i")

    def names() -> Iterator[bytes]:
        for name, label in _list_lines(file):
            labels.append(numbers.setdefault(label, len(numbers)))
            yield name

    packed = Packed.of(names())
    if not labels:
        raise UserError(f"{file} is empty: expected a line 'path label' for each image")
    classes, indices, numbered = _classes([os.fsdecode(label) for label in numbers], file)
    return Found(SampleIndex(packed, indices[np.array(labels)], classes, "", numbered=numbered), [os.fsencode(file)])


def _list_lines(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """The path and the label on each line of a list file; a path may hold spaces, and empty lines do not count."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            parts = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rsplit(None, 1)
            if len(parts) == 1:
                raise UserError(f"{file}, line {number}: expected 'path label', found '{os.fsdecode(line).strip()}'")
            if parts:
                path, label = parts
                yield os.path.normpath(path) if b"./" in path or b"//" in path else path, label


def _are_numbers(labels: Iterable[str], source: Path) -> bool:
    """Whether labels are whole numbers; raises UserError for numbers among names, which would all become names."""
    kinds = {label: bool(NUMBER.fullmatch(label)) for label in labels}
    if any(kinds.values()):
        odd = next((label for label in kinds if not WHOLE.fullmatch(label) or int(label) > MAX_LABEL), None)
        if odd is not None:
            raise UserError(
                f"{source}: label {odd or 'missing'}; labels are whole numbers from 0 on, or all of them names"
            )
    return all(kinds.values())


def _classes(labels: Sequence[str], source: Path) -> tuple[list[str], np.ndarray, bool]:
    """The classes of some labels, the place of each label in them, and whether they are numbers from 0 on."""
    if not _are_numbers(labels, source):
        return *_named(labels), False
    numbers = [int(label) for label in labels]
    return [str(number) for number in range(max(numbers) + 1)], np.array(numbers, np.int32), True


def _named(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sorted names of classes, and the place of each label in them."""
    classes = sorted(set(labels))
    places = {name: place for place, name in enumerate(classes)}
    return classes, np.array([places[label] for label in labels], np.int32)


class _Member(NamedTuple):
    name: str
    label: str
    span: tuple[int, int, int]


def _scan_tars(files: Sequence[Path], base: Path) -> Found:
    contents = [_content(file) for file in files]
    with_labels = any(labels for _, labels in contents)
    members = []
    for number, (file, (images, labels)) in enumerate(zip(files, contents, strict=True)):
        common = os.path.commonpath([os.path.dirname(info.name) or "." for info in images]) if images else ""
        for info in images:
            if with_labels:
                label = labels.get(info.name.rpartition(".")[0])
                if not label:
                    raise UserError(
                        f"{file}: {info.name} has no label; others have one in a file of the same name, .cls"
                    )
            else:
                label = _folder_in_tar(os.path.dirname(info.name), common) or (
                    file.stem if len(files) > 1 else os.path.basename(common)
                )
            members.append(_Member(info.name, label, (number, info.offset_data, info.size)))
    if not members:
        raise UserError(f"no images in {', '.join(map(str, files[:3]))}{' ...' if len(files) > 3 else ''}")
    members.sort(key=lambda member: (member.span[0], member.name))
    labels = [member.label for member in members]
    classes, numbers, numbered = _classes(labels, base) if with_labels else (*_named(labels), False)
    entries = SampleIndex(
        Packed.of(os.fsencode(f"{files[member.span[0]].name}/{member.name}") for member in members),
        numbers,
        classes,
        str(base),
        numbered=numbered,
        spans=np.array([member.span for member in members], np.int64),
        tars=[str(file) for file in files],
    )
    return Found(entries, [os.fsencode(file) for file in files])


def _folder_in_tar(folder: str, common: str) -> str:
    """The first folder on the way to an image in which it differs from others of its tar file."""
    below = os.path.relpath(folder or ".", common or ".")
    return "" if below == "." else below.split(os.sep)[0]


def _content(file: Path) -> tuple[list[tarfile.TarInfo], dict[str, str]]:
    """The images of a tar file, and the labels in its `.cls` members by their names without the suffix.

    Raises:
        UserError: no tar file, a compressed one, one that is cut off, or a link instead of an image.
    """
    images, labels = [], {}
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                info.name = os.path.normpath(info.name)  # `tar -C folder .` writes ./name
                key, _, suffix = info.name.rpartition(".")
                content = tar.extractfile(info) if info.isfile() and suffix == "cls" else None
                if content is not None:
                    labels[key] = content.read().decode(errors="replace").strip()
                elif is_image(os.fsencode(os.path.basename(info.name))) and not info.isdir():
                    if not info.isfile():
                        raise UserError(f"{file}: {info.name} is a link, which cannot be read at its place; pack files")
                    images.append(info)
            stream.seek(tar.offset)
            end = stream.read(1 << 20)
    except (tarfile.TarError, OSError) as problem:
        raise UserError(f"{file} is no uncompressed tar file ({problem}); images need no compression") from None
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise UserError(f"{file} is cut off or damaged behind {len(images)} images: it has no end, or more than one")
    return images, labels
