"""Check that a machine has what loader processes need: shared memory, open files, short paths. Imports no torch.

All are checked before the processes start. A process that lacks one of them loses its batch without an error, and the
trainer would then wait for the batch forever.
"""

import os
import resource
import shutil
import tempfile

from exnorm.config.errors import UserError
from exnorm.runs.subprocesses import workers_here

SHARED = "/dev/shm"
OWN_FILES = "/proc/self/fd"
BATCHES_AHEAD = 2  # batches that each process prepares ahead, `prefetch_factor` of torch's DataLoader
FILES_EACH = 16  # open files for each process: pipes to and from it, and its batches on their way
LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # the longest path of a socket, less Python's part of it
ALTERNATIVES = "Type data.workers=0, or give a container more: docker run --shm-size=8g"


def check_room(workers: int, *, batches: int, batch_bytes: int) -> None:
    """Check the shared memory, and raise the limit of open files if `workers` loader processes need more.

    Args:
        batches: the number of batches in an epoch.
        batch_bytes: the size of one batch.

    Raises:
        UserError: there is too little shared memory, too few files may be open, or the path of the temporary folder is
            too long. It says what to type.
    """
    if workers == 0:
        return
    _check_temporary_folder()
    needed = workers_here() * min(workers * BATCHES_AHEAD, batches) * batch_bytes
    if os.path.isdir(SHARED) and shared_free() < needed:
        raise UserError(
            f"shared memory is too small: {SHARED} has {shared_free()} bytes free, and the batches that loader "
            f"processes prepare take {needed}. {ALTERNATIVES}"
        )
    allow_files(FILES_EACH * (workers + 1), users="the loader processes", advice="Type data.workers=0, or use")


def _check_temporary_folder() -> None:
    folder = tempfile.gettempdir()
    if os.path.isdir(SHARED) and len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise UserError(
            f"the path of the temporary folder is too long for sockets of loader processes: {folder}. Set TMPDIR to "
            f"a folder with a path of at most {LONGEST_FOLDER} bytes, such as /tmp, or type data.workers=0"
        )


def shared_free() -> int:
    """Return the bytes of shared memory that are free; 0 where there is none."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return 0


def no_shared_memory() -> str:
    """Return the message for shared memory that is full."""
    return (
        f"shared memory is full: {SHARED} has {shared_free()} bytes free, and loader processes pass images through it. "
        f"{ALTERNATIVES}"
    )


def no_files() -> str:
    """Return the message for a process that may open no more files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files: this shell allows {soft}. Type ulimit -n 4096 first, or data.workers=0"


def allow_files(more: int, *, users: str, advice: str) -> None:
    """Raise the limit of open files, if this process needs it for `more` files than it has open now. Linux only.

    Args:
        users, advice: what needs them, and what else one can do, for the error message.

    Raises:
        UserError: the limit cannot be raised so far.
    """
    if not os.path.isdir(OWN_FILES):
        return
    needed = len(os.listdir(OWN_FILES)) + more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"too few open files: this shell allows {hard} (ulimit -H -n), and {users} need about {needed}. {advice} a "
            "shell with a higher limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
