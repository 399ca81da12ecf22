"""List the names of timm's models without importing timm in this process, because timm imports torch."""

import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path

from exnorm.config.cache import cache_folder
from exnorm.config.errors import UserError
from exnorm.config.groups import (
    group_options,
    is_class,
    option_values,
    register_model_names,
    register_option,
    unknown_option,
)

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
    """Register what has no yaml, of `model=NAME`, `norm=NAME` and sweeps over them: timm's models, and classes.

    Raises:
        UserError: timm has no such model; the message gives the nearest names.
    """
    words = list(overrides)
    for name in filter(partial(is_class, "norm"), requested("norm", words)):
        register_option("norm", name, option_values("norm", name))
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
    """Return the names in `model=a` and `model=a,b`; skip what Hydra cannot parse, because Hydra reports it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    names: list[str] = []
    for text in overrides:
        if not text.startswith(f"{group}="):
            continue
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue
        value = override.value()
        if override.is_sweep_override():
            names += [] if isinstance(value, Glob) else override.sweep_string_iterator()
        elif isinstance(value, str) and value:
            names.append(value)
    return names
