"""Sets of drawn images: drawn once per machine into one file of the cache (`exnorm.data.pixel_file`).

If the images have masks, the mask is the fourth channel of the image. `exnorm.data.painter` says what a plan is.
"""

import contextlib
import functools
import hashlib
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exnorm.data import painter
from exnorm.data.drawing import Plan
from exnorm.data.pixel_file import HEADER, PixelFile, made_once
from exnorm.data.splits import Images, MaskedImages
from exnorm.runs.subprocesses import available_cores, importing_environment

FEW = 200  # so few images are drawn faster than a process starts


def images(plan: Plan, count: int) -> Images:
    """Return the images of a plan; draw them if they are not in the cache."""
    labels = [index % len(plan.texts) for index in range(count)]
    file = _drawn(plan, count)
    return Images(labels, file.open_image, read_pixels=file.read_pixels)


def masked_images(plan: Any, count: int) -> MaskedImages:
    """Return the images and masks of a plan; draw them if they are not in the cache."""
    file = _drawn(plan, count)
    return MaskedImages(count, file.open_image, partial(_open_mask, file), same_size=True)


def _drawn(plan: Any, count: int) -> PixelFile:
    name = f"images-{fingerprint(plan, count)[:24]}.bin"
    return made_once(name, painter.module_of(plan).shape(plan), count, partial(_draw_all, plan, count))


def fingerprint(plan: Any, count: int) -> str:
    """Return a text that changes with the images."""
    fonts = [(Path(font).name, _hash(font)) for font in plan.fonts]
    determined_by = (painter.module_of(plan).VERSION, count, plan._replace(fonts=fonts))
    return hashlib.sha256(repr(determined_by).encode()).hexdigest()


@functools.cache
def _hash(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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


def _open_mask(file: PixelFile, index: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(file.images[index, ..., 3]))
