"""The folders whose YAML files are the options of a command: exnorm's `conf/`, and those of users and of packages.

Such a folder has folders like `norm/`, `data/` and `task/`, with a YAML file for each option, as `conf/` has.
A user names it in the environment variable EXNORM_CONF or after `exnorm --config-dir`. An installed package names it as
an entry point: the folder of a package that need not have Python files.

    [project.entry-points."exnorm.conf"]
    my_package = "my_package.conf"
"""

import functools
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

from exnorm.config.errors import UserError

VARIABLE = "EXNORM_CONF"
ENTRY_POINTS = "exnorm.conf"


def conf_dir() -> Path:
    """Return exnorm's own folder `conf/`: inside the package (wheel), else next to it (checkout)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"there is no conf/train.yaml in {package} or next to it. Reinstall exnorm")


def add_folder(folder: Path) -> None:
    """Add a folder to EXNORM_CONF, for this process and those that it starts."""
    known = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = os.pathsep.join([str(folder.expanduser().absolute()), *([known] if known else [])])


def conf_folders() -> list[Path]:
    """Return exnorm's own folder, those of EXNORM_CONF, and those of installed packages.

    Raises:
        UserError: a folder does not exist.
    """
    named = [Path(text).expanduser().resolve() for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    for folder in named:
        if not folder.is_dir():
            raise UserError(f"{VARIABLE} or --config-dir: there is no folder {folder}")
    return list(dict.fromkeys([conf_dir(), *named, *_of_packages()]))


@functools.cache
def _of_packages() -> tuple[Path, ...]:
    """Return the folders that installed packages name. No code of theirs runs for it."""
    folders = (_folder_of(point) for point in metadata.entry_points(group=ENTRY_POINTS))
    return tuple(folder for folder in folders if folder is not None)


def _folder_of(point: metadata.EntryPoint) -> Path | None:
    top, *rest = point.value.split(".")
    spec = importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place).joinpath(*rest)
        if folder.is_dir():
            return folder
    where = f"entry point {point.name} of {ENTRY_POINTS}"
    print(f"exnorm: warning: {where}: {point.value} is no folder of an installed package", file=sys.stderr)
    return None
