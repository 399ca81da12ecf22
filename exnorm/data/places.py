"""Where the files of a data set lie, and which of them are left out."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError
from exnorm.data.entries import Entries


def root_of(config: Any, *, layout: str, name: str | None = None) -> Path:
    """`data.root`, or else the folder named after the set in `data.roots`.

    Args:
        layout: what the folder should hold, for the error.
        name: of the folder, if it is not the set's.

    Raises:
        UserError: neither is given, or there is no such folder.
    """
    folder = str(name or config.name)
    if config.root is not None:
        root, key = Path(config.root).expanduser(), f"data.root={config.root}"
    elif config.roots:
        root, key = Path(config.roots).expanduser() / folder, f"data.roots={config.roots}"
    else:
        raise UserError(
            f"data={config.name} needs a folder: data.roots=DIR (in the environment EXNORM_DATA=DIR) with "
            f"DIR/{folder}, or, for the set that is trained on, data.root=DIR; {layout}"
        )
    if not root.is_dir():
        raise UserError(f"{key}: there is no folder {root}; {layout}")
    return root


def file_of(name: str, root: Path, key: str) -> Path:
    """A file that the option `key` names, from the current folder or else from the root.

    Raises:
        UserError: it is in neither.
    """
    for file in (Path(name).expanduser(), root / name):
        if file.is_file():
            return file
    raise UserError(f"{key}={name}: there is no such file, neither here nor in {root}")


def excluded_places(entries: Entries, config: Any, root: Path) -> np.ndarray:
    """A mask of the files of a split that `data.exclude` names."""
    lines = excluded_lines(config, root)
    if not lines:
        return np.zeros(len(entries), bool)
    return np.array([path in lines for path in _paths(entries, root)])


def paths_of(entries: Entries, root: Path) -> set[bytes]:
    """The paths of files from the root, and absolute."""
    base = os.fsencode(os.path.abspath(root))
    paths = set(_paths(entries, root))
    return {*paths, *(os.path.join(base, path) for path in paths)}


def _paths(entries: Entries, root: Path) -> Iterator[bytes]:
    folder = os.fsencode(os.path.relpath(entries.base, root))
    start = b"" if folder == b"." else folder + b"/"
    for place in range(len(entries)):
        name = entries.names.raw(place)
        yield name if name.startswith(b"/") else start + name


def excluded_lines(config: Any, root: Path) -> set[bytes]:
    """The lines of the file that `data.exclude` names: a path on each, from the root or absolute; both forms of each.

    Empty lines and those that begin with # say nothing.

    Raises:
        UserError: there is no such file.
    """
    if config.exclude is None:
        return set()
    file = Path(config.exclude).expanduser()
    if not file.is_file():
        raise UserError(f"data.exclude={config.exclude}: there is no such file; it holds a path on each line")
    lines = (line.strip() for line in file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines())
    base = os.fsencode(os.path.abspath(root))
    paths = [os.path.normpath(os.path.join(base, line)) for line in lines if line and not line.startswith(b"#")]
    return {*paths, *(os.path.relpath(path, base) for path in paths)}
