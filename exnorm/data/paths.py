"""Find the files of a data set, and the files that the user excludes."""

import codecs
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data.sample_index import SampleIndex

BAD_IMAGES = ("data", "index", "path", "reason")  # the columns of a run's bad_images.csv


def root_of(config: Any, *, layout: str, name: str | None = None) -> Path:
    """Return `data.root`, or else the folder named after the set in `data.roots`.

    Args:
        layout: the files that the folder should have, for the error message.
        name: the name of the folder, if it is not that of the set.

    Raises:
        UserError: neither is given, or the folder does not exist.
    """
    folder = str(name or config.name)
    if config.root is not None:
        root, key = Path(config.root).expanduser(), f"data.root={config.root}"
    elif config.roots:
        root, key = Path(config.roots).expanduser() / folder, f"data.roots={config.roots}"
    else:
        raise UserError(
            f"data={config.name} needs a folder. Type data.roots=DIR (or set EXNORM_DATA=DIR in the environment) if "
            f"the files are in DIR/{folder}. For the set that is trained on, data.root=DIR also works; {layout}"
        )
    if not root.is_dir():
        raise UserError(f"{key}: there is no folder {root}; {layout}")
    return root


def file_of(name: str, root: Path, key: str) -> Path:
    """Return the file that the option `key` names, relative to the current folder or else to the root.

    Raises:
        UserError: the file does not exist in either folder.
    """
    for file in (Path(name).expanduser(), root / name):
        if file.is_file():
            return file
    raise UserError(f"{key}={name}: there is no such file in the current folder or in {root}")


def excluded_mask(entries: SampleIndex, config: Any, root: Path) -> np.ndarray:
    """Return a mask of the files of a split that `data.exclude` lists."""
    lines = excluded_lines(config, root)
    if not lines:
        return np.zeros(len(entries), bool)
    return np.array([path in lines for path in _paths(entries, root)])


def paths_of(entries: SampleIndex, root: Path) -> set[bytes]:
    """Return the paths of files, both relative to the root and absolute."""
    base = os.fsencode(os.path.abspath(root))
    paths = set(_paths(entries, root))
    return {*paths, *(os.path.join(base, path) for path in paths)}


def _paths(entries: SampleIndex, root: Path) -> Iterator[bytes]:
    folder = os.fsencode(os.path.relpath(entries.base, root))
    start = b"" if folder == b"." else folder + b"/"
    for place in range(len(entries)):
        name = entries.names.raw(place)
        yield name if name.startswith(b"/") else start + name


def excluded_lines(config: Any, root: Path) -> set[bytes]:
    """Return the paths in the file `data.exclude`, each both relative to the root and absolute.

    Raises:
        UserError: there is no such file.
    """
    base = os.fsencode(os.path.abspath(root))
    paths = [os.path.normpath(os.path.join(base, line)) for line in listed_paths(config)]
    return {*paths, *(os.path.relpath(path, base) for path in paths)}


def listed_paths(config: Any) -> list[bytes]:
    """Return the paths in the file `data.exclude` as they are written there, relative to the root or absolute.

    The file has one path per line; empty lines and lines that begin with # are ignored. It can also be the
    `bad_images.csv` of a run.

    Raises:
        UserError: there is no such file.
    """
    if config.exclude is None:
        return []
    file = Path(config.exclude).expanduser()
    if not file.is_file():
        raise UserError(f"data.exclude={config.exclude}: there is no such file. It must have one path per line")
    text = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    table = csv.DictReader(io.StringIO(os.fsdecode(text), newline=""))
    if table.fieldnames and list(table.fieldnames) == list(BAD_IMAGES):
        return [os.fsencode(row["path"]) for row in table if row["path"]]
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(b"#")]
