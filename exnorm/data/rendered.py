"""Sets of drawn images: drawn once per machine into one file of the cache, which is mapped into memory.

The file begins with a line of JSON, padded to 4,096 bytes, with a checksum of the images. The images follow. If they
have masks, the mask is the fourth channel of the image. `exnorm.data.painter` says what a plan is.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exnorm.data import painter
from exnorm.data.drawing import Plan
from exnorm.data.splits import Images, MaskedImages
from exnorm.runs.cache import cache_folder
from exnorm.runs.folder import flock
from exnorm.runs.subprocesses import available_cores, importing_environment

HEADER = 4096  # bytes
FEW = 200  # so few images are drawn faster than a process starts


def images(plan: Plan, count: int) -> Images:
    """Return the images of a plan; draw them if they are not in the cache."""
    labels = [index % len(plan.texts) for index in range(count)]
    return Images(labels, partial(_open, *_cached(plan, count)))


def masked_images(plan: Any, count: int) -> MaskedImages:
    """Return the images and masks of a plan; draw them if they are not in the cache."""
    file = _cached(plan, count)
    return MaskedImages(count, partial(_open, *file), partial(_open_mask, *file), same_size=True)


def _cached(plan: Any, count: int) -> tuple[str, tuple[int, ...]]:
    """Return the file with the images of a plan, and the shape of an image."""
    path = cache_folder() / f"images-{fingerprint(plan, count)[:24]}.bin"
    with _alone(path):
        if not _is_whole(path):
            _build(plan, count, path)
    return str(path), painter.module_of(plan).shape(plan)


def fingerprint(plan: Any, count: int) -> str:
    """Return a text that changes with the images."""
    fonts = [(Path(font).name, _hash(font)) for font in plan.fonts]
    determined_by = (painter.module_of(plan).VERSION, count, plan._replace(fonts=fonts))
    return hashlib.sha256(repr(determined_by).encode()).hexdigest()


@functools.cache
def _hash(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let only one process build a file at a time; the others wait."""
    with path.with_suffix(".lock").open("w") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX)
        yield


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with path.open("rb") as file:
            whole = json.loads(file.read(HEADER)) == _facts(path)
    except (OSError, ValueError):
        whole = False
    if not whole:
        print(f"exnorm: warning: {path} is damaged; its images are drawn again", file=sys.stderr, flush=True)
    return whole


def _build(plan: Any, count: int, path: Path) -> None:
    part = path.with_suffix(".part")  # one builder at a time; the leftover of a killed one is overwritten
    with part.open("wb") as file:
        file.truncate(HEADER + count * painter.image_bytes(plan))
    _draw_all(plan, count, part)
    facts = json.dumps(_facts(part))
    with part.open("r+b") as file:
        file.write(facts.encode().ljust(HEADER))
    part.replace(path)
    _pixels.cache_clear()


def _facts(path: Path) -> dict[str, int]:
    """Return the size and the checksum of a file's images."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(HEADER)
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size - HEADER, "crc32": checksum}


def _draw_all(plan: Any, count: int, file: Path) -> None:
    if count <= FEW:
        painter.draw_into(plan, file, HEADER, 0, count)
        return
    cores = available_cores()
    bounds = [count * share // cores for share in range(cores + 1)]
    # Only the trainer answers signals to all processes of a job; the end of this process closes the pipes.
    options: dict[str, Any] = {"env": importing_environment(), "stdin": subprocess.PIPE, "start_new_session": True}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(painter.command(plan, file, HEADER, start, stop), **options))
            for start, stop in pairwise(bounds)
        ]
        if any([process.wait() for process in processes]):  # noqa: C419  # all are waited for before a pipe closes
            raise RuntimeError(f"drawing {count} images failed. The messages of its processes are above")


@functools.cache
def _pixels(path: str, shape: tuple[int, ...]) -> Any:
    return np.memmap(path, np.uint8, "r", HEADER).reshape(-1, *shape)


def _open(path: str, shape: tuple[int, ...], index: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_pixels(path, shape)[index, ..., :3]))


def _open_mask(path: str, shape: tuple[int, ...], index: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_pixels(path, shape)[index, ..., 3]))
