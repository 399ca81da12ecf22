"""One line for what a machine lacks: disk, shared memory, open files, memory, a disk that works. Imports no torch."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from exnorm.runs.folder import DISK_FULL, RunFolder
from exnorm.runs.loader_room import no_files, no_shared_memory, shared_free

BROKEN_DISK = (errno.EIO, errno.EROFS, errno.ESTALE, errno.EREMOTEIO)
FORBIDDEN = (errno.EACCES, errno.EPERM)
LITTLE = 1 << 20  # bytes; less free shared memory counts as none
NO_SHARED_MEMORY = re.compile(r"shared memory\(shm\)|out of shared memory|killed by signal: Bus error|</torch_")
NO_FILES = re.compile(r"Too many open files|items of ancdata")
LOST_LOADER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: \w+|exited unexpectedly)")
LOST_WORKER = re.compile(
    r"[Cc]onnection (was )?(closed|reset) by|Connection was likely closed|Connection refused|Broken pipe|"
    r"remote process exit"
)


def shortage(problem: BaseException, folder: RunFolder) -> str | None:
    """Return what ran out and what to type, if an error is about that; None for any other error."""
    if not isinstance(problem, OSError | RuntimeError):
        return None
    code, file = getattr(problem, "errno", None), getattr(problem, "filename", None)
    if code in (errno.EMFILE, errno.ENFILE) or NO_FILES.search(str(problem)):
        return no_files()
    if NO_SHARED_MEMORY.search(str(problem)) or (code == errno.ENOSPC and file is None and shared_free() < LITTLE):
        return no_shared_memory()
    if code in DISK_FULL:
        return f"{file or folder.path}: the disk is full. Free some space; then the same command {folder.continues()}"
    for cause in (problem, problem.__cause__):
        if isinstance(cause, OSError) and cause.errno is not None and _is_of_disk(cause, folder):
            return (
                f"{cause.filename or folder.path}: {os.strerror(cause.errno)}. When the disk works and can be written, "
                f"the same command {folder.continues()}"
            )
    for cause in _causes(problem):
        if found := LOST_LOADER.search(str(cause)):
            return (
                f"a loader process ended ({found[0]}). If the memory is full, use fewer data.workers. Then the same "
                f"command {folder.continues()}"
            )
    return None


def is_lost_worker(problem: BaseException) -> bool:
    """Return whether an error says that another worker of the run has ended."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(problem, RuntimeError) and LOST_WORKER.search(str(problem)) is not None


def _is_of_disk(problem: OSError, folder: RunFolder) -> bool:
    """Return whether a disk is broken or read-only, or the run folder may not be written."""
    if problem.errno in FORBIDDEN and isinstance(problem.filename, str | bytes):
        return folder.path.absolute() in Path(os.fsdecode(problem.filename)).absolute().parents
    return problem.errno in BROKEN_DISK


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """Return an error and those during which it was raised: torch tells of a lost loader in a signal handler."""
    seen: BaseException | None = problem
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
