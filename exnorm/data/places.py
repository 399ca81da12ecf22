"""Where the files of a data set lie, and which of them are left out."""

import os
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
    elif config.roots is not None:
        root, key = Path(config.roots).expanduser() / folder, f"data.roots={config.roots}"
    else:
        raise UserError(
            f"data={config.name} needs a folder: data.root=DIR, or data.roots=DIR (in the environment "
            f"EXNORM_DATA=DIR) with DIR/{folder}; {layout}"
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
    """Which files of a split `data.exclude` names: a file with a path on each line, absolute or from the root.

    Empty lines and those that begin with # say nothing.

    Raises:
        UserError: there is no such file.
    """
    if config.exclude is None:
        return np.array([], np.int64)
    text = file_of(config.exclude, root, "data.exclude").read_text(encoding="utf-8", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    names = {os.path.relpath(os.path.abspath(root / line), os.path.abspath(entries.base)) for line in lines}
    return np.array([place for place, name in enumerate(entries.names) if name in names], np.int64)
