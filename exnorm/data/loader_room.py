"""What loader processes need of a machine: shared memory for batches, open files. Imports no torch.

Both are asked for before the processes start: a process that lacks one of them loses its batch without a word, and the
trainer would wait for it for ever.
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
    """Raise the limit of open files to what `workers` loader processes need, and see that their batches have room.

    Args:
        batch_bytes: the size of one batch.

    Raises:
        UserError: too little shared memory, or too few open files, with what to type.
    """
    if workers == 0:
        return
    needed = workers * BATCHES_AHEAD * batch_bytes
    if os.path.isdir(SHARED) and shared_free() < needed:
        raise UserError(no_shared_memory(needed))
    if os.path.isdir(OWN_FILES):
        _allow_files(len(os.listdir(OWN_FILES)) + FILES_EACH * (workers + 1))


def shared_free() -> int:
    """The bytes of shared memory that are free; 0 where there is none."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return 0


def no_shared_memory(needed: int | None = None) -> str:
    """The line that says that shared memory is too small."""
    wanted = "" if needed is None else f" of the {needed} that prepared batches take"
    return (
        f"shared memory is full: {SHARED} has {shared_free()} bytes free{wanted}, and loader processes pass images "
        "through it. Type data.workers=0, or give a container more: docker run --shm-size=8g"
    )


def no_files() -> str:
    """The line that says that too few files may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files: this shell allows {soft}. Type ulimit -n 4096 first, or data.workers=0"


def _allow_files(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(no_files())
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
