"""One line for a machine that ran out of something: disk, shared memory, open files. Imports no torch."""

import errno
import re
import resource
import shutil

from exnorm.runs.folder import DISK_FULL, RunFolder

SHARED = "/dev/shm"
LITTLE = 1 << 20  # bytes: less of shared memory is none
NO_SHARED_MEMORY = re.compile(r"shared memory\(shm\)|out of shared memory|killed by signal: Bus error|</torch_")
NO_FILES = re.compile(r"Too many open files|items of ancdata")


def shortage(problem: BaseException, folder: RunFolder) -> str | None:
    """What ran out and what to type, if that is what an error is about; None for any other error."""
    if not isinstance(problem, OSError | RuntimeError):
        return None
    code, file = getattr(problem, "errno", None), getattr(problem, "filename", None)
    if NO_SHARED_MEMORY.search(str(problem)) or (code == errno.ENOSPC and file is None and _shared_free() < LITTLE):
        return (
            f"shared memory is full: {SHARED} has {_shared_free()} bytes free, and loader processes pass images "
            "through it. Type data.workers=0, or give a container more: docker run --shm-size=8g"
        )
    if code in (errno.EMFILE, errno.ENFILE) or NO_FILES.search(str(problem)):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files: this shell allows {soft}. Type ulimit -n 4096 first, or data.workers=0"
    if code in DISK_FULL:
        return f"{file or folder.path}: the disk is full. Make room; then the same command {folder.continues()}"
    return None


def _shared_free() -> int:
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return 0
