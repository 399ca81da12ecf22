"""Files that are made once per machine and kept between processes: compiled code, rendered images."""

import contextlib
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exnorm.config.cache import cache_folder

__all__ = ["building_in", "cache_folder", "processor"]


@contextlib.contextmanager
def building_in(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It is moved to `path` at the end, so nobody sees an incomplete file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def processor() -> str:
    """Return the instruction set of this processor, because different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
