"""Where what is made once per machine stays between processes: compiled code, rendered images."""

import contextlib
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exnorm.config.cache import cache_folder

__all__ = ["building_in", "cache_folder", "processor"]


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
