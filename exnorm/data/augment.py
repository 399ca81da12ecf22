"""Policies of augmentation by their names in timm: RandAugment, AutoAugment, AugMix.

timm's posterizing may keep 0 bits of a colour, which Pillow 13 refuses; `rand-m9-mstd0.5-inc1` draws that once in some
hundred images. Here at least 1 bit is kept, with any Pillow.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform

from exnorm.config.errors import UserError, first_line

TRIALS = 200  # of a policy, which draws operations and their strengths


def policy(config: Any) -> Callable[[Image.Image], Image.Image]:
    """Return the policy `data.auto_augment`, which turns an image into an image.

    Raises:
        UserError: timm does not know the policy, or cannot apply it.
    """
    try:
        stages: Any = create_transform(
            input_size=config.image_size,
            is_training=True,
            auto_augment=config.auto_augment,
            color_jitter=None,  # pyright: ignore[reportArgumentType]
            interpolation="bilinear",
            mean=tuple(config.mean),
            separate=True,
        )
        augment = stages[1]  # behind crop and flip
        for operation in augment.transforms:
            _keep_a_bit(operation)
        image = Image.new("RGB", (32, 32))
        for _ in range(TRIALS):
            augment(image)
    except (AssertionError, KeyError, ValueError) as problem:
        raise UserError(
            f"data.auto_augment={config.auto_augment}: timm cannot apply this policy ({type(problem).__name__}: "
            f"{first_line(problem)}). Type for example data.auto_augment=rand-m9-mstd0.5-inc1, augmix-m3-w3 or original"
        ) from problem
    return augment


def _keep_a_bit(operation: Any) -> None:
    """Replace timm's posterizing in a policy, which has `ops`, or lists of them in `policy`."""
    groups = getattr(operation, "policy", None) or [getattr(operation, "ops", [])]
    for part in chain.from_iterable(groups):
        if part.aug_fn is auto_augment.posterize:
            part.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(image, max(1, bits_to_keep), **options)
