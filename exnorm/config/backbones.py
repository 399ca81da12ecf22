"""List the names of timm's models without importing timm in this process, because timm imports torch."""

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from exnorm.config.cache import cache_folder
from exnorm.config.errors import UserError
from exnorm.config.groups import (
    BY_CLASS,
    group_options,
    is_class,
    option_values,
    register_model_names,
    register_option,
    unknown_option,
)
from exnorm.config.loggers import check_loggers
from exnorm.config.words import chosen

LIST_MODELS = "import timm; print('\\n'.join(timm.list_models()))"


def timm_names() -> list[str]:
    """Return the names of timm's architectures. A subprocess lists them once per version of timm; they are cached."""
    try:
        version = metadata.version("timm")
    except metadata.PackageNotFoundError:
        raise UserError("timm is not installed. Type pip install timm, or choose a model from conf/model") from None
    cache = cache_folder() / f"timm-{version}.txt"
    if cache.is_file():
        return cache.read_text(encoding="utf-8").split()
    done = subprocess.run([sys.executable, "-P", "-c", LIST_MODELS], capture_output=True, text=True, check=False)
    names = done.stdout.split()
    if done.returncode or not names:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"timm {version} cannot list its models: {reason}. For more, type python -c 'import timm'")
    write_cache(cache, "\n".join(names) + "\n")
    return names


def write_cache(path: Path, text: str) -> None:
    """Write a cache file in one step. If this fails, for example on a full disk, only print a warning."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as problem:
        print(f"exnorm: warning: the list of models is not cached: {problem}", file=sys.stderr)


def register_requested(overrides: Iterable[str]) -> None:
    """Register what has no yaml, of `model=NAME`, `norm=NAME`, `logger=NAME` and sweeps: timm's models, and classes.

    Raises:
        UserError: timm has no such model, and the message gives the nearest names; or a wrong logger.
    """
    words = list(overrides)
    check_loggers(words)
    for group in BY_CLASS:
        for name in requested(group, words):
            if is_class(group, name):
                register_option(group, name, option_values(group, name))
    known = group_options("model")
    wanted = [name for name in requested("model", words) if name not in known]
    if not wanted:
        return
    architectures = set(timm_names())
    for name in wanted:
        if name.partition(".")[0] not in architectures:  # what follows the dot is the name of pretrained weights
            raise UserError(unknown_option("model", name, sorted(architectures | set(known))))
    register_model_names(wanted)


def requested(group: str, overrides: Iterable[str]) -> list[str]:
    """Return the names in `model=a`, `model=a,b` and `logger=[a,b]`."""
    values = chosen(group, overrides)
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in names if isinstance(name, str) and name]
