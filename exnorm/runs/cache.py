"""Where what is made once per machine stays between processes: compiled code, rendered images."""

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """`exnorm` in $XDG_CACHE_HOME, in ~/.cache, or else in the temporary folder."""
    for base in (os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache", tempfile.gettempdir()):
        folder = Path(base or "/nonexistent") / "exnorm"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise FileNotFoundError("no folder to keep compiled code and rendered images in; set XDG_CACHE_HOME")


@contextlib.contextmanager
def building_in(path: Path) -> Iterator[Path]:
    """A path in a folder of its own, to write to; moved to `path` at the end, so that nothing half-built is seen."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def processor() -> str:
    """What native code means here: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
