"""Images to tensors, in timm's transforms with the papers' crop rules.

Training: random resized crop and horizontal flip, bilinear, nothing else. Validation: resize the shorter side to
`resize`, centre crop of `image_size`, bilinear.
"""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

Transform = Callable[[Image.Image], Tensor]


def train_transform(config: Any) -> Transform:
    """Random resized crop, flip, normalization."""
    return create_transform(
        input_size=config.image_size,
        is_training=True,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        color_jitter=None,  # pyright: ignore[reportArgumentType]
        interpolation="bilinear",
        mean=tuple(config.mean),
        std=tuple(config.std),
    )  # type: ignore[return-value]


def eval_transform(config: Any) -> Transform:
    """Resize, centre crop, normalization."""
    return create_transform(
        input_size=config.image_size,
        is_training=False,
        interpolation="bilinear",
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_pct=config.image_size / (config.resize + 0.5),  # timm rounds image_size / crop_pct down
    )  # type: ignore[return-value]
