"""Compare a network that was read from a file with the model that was written, on images."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError, first_line
from exnorm.data import fingerprint, load, validation_sets
from exnorm.data.loader import SeededImages
from exnorm.data.validation import matched
from exnorm.tasks import Task

IMAGES = 64
BATCH = 7  # the first image is a batch of its own, and the other 63 are 9 batches
# Largest difference of the logits, as a share of the largest logit. Other kernels add in another order: differences of
# 1e-6 are usual. A layer with wrong values makes more than 1e-2.
TOLERANCE = 1e-3


class CheckFailed(UserError):
    """The network in a file is not the model that was written."""


class Agreement(NamedTuple):
    """How much two networks agree.

    Attributes:
        difference: the largest difference of the logits.
        logit: the largest absolute logit of the model.
        same_class: the share of images, or of positions of masks, with the same most likely class.
    """

    difference: float
    logit: float
    same_class: float


class Sample(NamedTuple):
    """Images for a check, (N, 3, height, width), and what they are, in words."""

    images: Tensor
    what: str


def sample(config: Any, task: Task) -> Sample:
    """Return evenly spaced validation images, all cropped to one size; random ones if the data set cannot be read."""
    transform = task.transform(config.data, "centre")
    try:
        fingerprint(config.data, train=False)
        splits = matched(load(config.data, train=False), task.classes, name=config.data.name)
        name, images = next(iter(validation_sets(config.data, splits).items()))
        dataset = SeededImages(images, transform, seed=config.seed)
        indices = np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).round().astype(int).tolist()
        pixels = dataset.__getitems__([(0, index) for index in indices])[0]
        what = f"{len(pixels)} validation images of {name}"
    except (UserError, ImportError, OSError) as problem:
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (IMAGES, transform.size, transform.size, 3), generator=random, dtype=torch.uint8)
        what = f"{IMAGES} random images, because data={config.data.name} cannot be read ({first_line(problem)}),"
    return Sample(transform.normalize(pixels).contiguous(), what)


def batches(images: Tensor, smallest: int | None) -> Iterator[Tensor]:
    """Yield the first image, then the others in batches; the first one is cut to a width if the network takes several.

    Args:
        smallest: the smallest width that the network takes; None if it takes one size only.
    """
    width = images.shape[-1]
    yield images[:1, ..., : width if smallest is None else max(smallest, width * 3 // 4)].contiguous()
    if len(images) > 1:
        yield from images[1:].split(BATCH)


@torch.no_grad()
def compare(run: Callable[[Tensor], Tensor], model: nn.Module, inputs: Iterator[Tensor]) -> Agreement:
    """Return how much a network agrees with a model.

    Raises:
        CheckFailed: the network returns another shape, or logits that differ by more than TOLERANCE or are not finite.
            Then the most likely class may differ. Else it differs only between two classes that are equally likely up
            to the difference.
    """
    differences, logits, same = [], [], []
    for images in inputs:
        expected, got = model(images), run(images)
        if got.shape != expected.shape:
            raise CheckFailed(f"it returns logits of shape {tuple(got.shape)}, and the model {tuple(expected.shape)}")
        differences.append((got - expected).abs().max())
        logits.append(expected.abs().max())
        same.append((got.argmax(1) == expected.argmax(1)).flatten())
    found = Agreement(
        float(torch.stack(differences).max()), float(torch.stack(logits).max()), float(torch.cat(same).float().mean())
    )
    if not found.difference <= TOLERANCE * found.logit:
        raise CheckFailed(f"its logits differ by up to {found.difference:.2g}, where the largest is {found.logit:.2g}")
    return found
