"""The folders whose YAML files are the options of a command: exnorm's `conf/`, and those of users and of packages.

Such a folder has folders like `norm/`, `data/`, `task/` and `study/`, with a YAML file for each option, as `conf/` has.
A user names it in the environment variable EXNORM_CONF or after `exnorm --config-dir`. An installed package names it as
an entry point: the folder of a package that need not have Python files.

    [project.entry-points."exnorm.conf"]
    my_package = "my_package.conf"
"""

import functools
import importlib.util
import os
from importlib import metadata
from pathlib import Path

from exnorm.config.errors import UserError
from exnorm.config.words import in_hydras_quotes

VARIABLE = "EXNORM_CONF"
ENTRY_POINTS = "exnorm.conf"


def conf_dir() -> Path:
    """Return exnorm's own folder `conf/`: inside the package (wheel), else next to it (checkout)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"there is no conf/train.yaml in {package} or next to it. Reinstall exnorm")


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
    return tuple(_folder_of(point) for point in metadata.entry_points(group=ENTRY_POINTS))


def _folder_of(point: metadata.EntryPoint) -> Path:
    top, *rest = point.value.split(".")
    spec = importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place).joinpath(*rest)
        if folder.is_dir():
            return folder
    raise UserError(f"entry point {point.name} of {ENTRY_POINTS}: {point.value} is no folder of an installed package")


def search_words() -> list[str]:
    """Return the override with which Hydra finds the options of all folders; none if there is only exnorm's own."""
    quoted = [in_hydras_quotes(f"file://{folder}") for folder in conf_folders()[1:]]
    return [f"hydra.searchpath=[{','.join(quoted)}]"] if quoted else []
