"""Check that a machine has the shared memory and open files that loader processes need. Imports no torch.

Both are checked before the processes start. A process that lacks one of them loses its batch without a message, and
the trainer would wait for this batch forever.
"""

import os
import resource
import shutil

from exnorm.config.errors import UserError

SHARED = "/dev/shm"
OWN_FILES = "/proc/self/fd"
BATCHES_AHEAD = 2  # batches that each process prepares ahead, `prefetch_factor` of torch's DataLoader
FILES_EACH = 16  # open files for each process: pipes to and from it, and its batches on their way


def check_room(workers: int, batch_bytes: int) -> None:
    """Raise the limit of open files to what `workers` loader processes need, and check the shared memory.

    Args:
        batch_bytes: the size of one batch.

    Raises:
        UserError: there is too little shared memory for their batches, or too few open files are allowed.
    """
    if workers == 0:
        return
    needed = workers * BATCHES_AHEAD * batch_bytes
    if os.path.isdir(SHARED) and shared_free() < needed:
        raise UserError(no_shared_memory(needed))
    if os.path.isdir(OWN_FILES):
        _allow_files(len(os.listdir(OWN_FILES)) + FILES_EACH * (workers + 1))


def shared_free() -> int:
    """Return the free bytes of shared memory; 0 if the machine has none."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return 0


def no_shared_memory(needed: int | None = None) -> str:
    """Return the message for too little shared memory."""
    wanted = "" if needed is None else f" of the {needed} that prepared batches need"
    return (
        f"shared memory is full: {SHARED} has {shared_free()} bytes free{wanted}. Loader processes pass images "
        "through it. Type data.workers=0, or give a container more: docker run --shm-size=8g"
    )


def no_files() -> str:
    """Return the message for too few open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files: this shell allows {soft}. Type ulimit -n 4096 first, or use data.workers=0"


def _allow_files(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(no_files())
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
