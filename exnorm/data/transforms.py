"""Images to tensors, in timm's transforms with the papers' crop rules.

Training: random resized crop and horizontal flip, bilinear, nothing else (with `padding`, CIFAR's random crop of the
padded image). Validation: resize the shorter side to `resize`, centre crop of `image_size`, bilinear. An image stays in
uint8 until it is on the device, as with timm's prefetcher. This copies a quarter of the memory and, for small images,
halves the work of a loader.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms


@dataclass(frozen=True)
class Transform:
    """The crop of an image and the normalization of a batch.

    Attributes:
        crop: turns an image into (3, size, size) in uint8.
        mean, std: of the channels, where white is 1.
    """

    crop: Callable[..., Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    def __call__(self, image: Image.Image, *targets: Any) -> tuple[Any, ...]:
        """Return the crop of an image, (size, size, 3) in uint8, and its targets, which are labels."""
        return torch.as_tensor(self.crop(image)).permute(1, 2, 0), *targets

    @property
    def sample_bytes(self) -> int:
        """The size of a cropped image."""
        return 3 * self.size**2

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return (N, height, width, 3) in uint8 as (N, 3, height, width): (pixels / 255 - mean) / std in float32.

        The channels stay last in memory.
        """
        mean, std = (_of_channels(values, pixels.device) for values in (self.mean, self.std))
        return (pixels.permute(0, 3, 1, 2).float() - mean).div_(std)


@functools.cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return values times 255 as a (3, 1, 1) tensor. It is cached, because a copy to a GPU delays the next step."""
    return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def train_transform(config: Any) -> Transform:
    """Return the transform: random resized crop, or random crop of the padded image; flip, normalization."""
    crop = (
        _padded_crop(config)
        if config.padding is not None
        else create_transform(
            input_size=config.image_size,
            is_training=True,
            use_prefetcher=True,
            scale=tuple(config.scale),
            ratio=tuple(config.ratio),
            hflip=config.hflip,
            color_jitter=None,  # pyright: ignore[reportArgumentType]
            interpolation="bilinear",
        )
    )
    return Transform(crop, tuple(config.mean), tuple(config.std), config.image_size)  # type: ignore[arg-type]


def _padded_crop(config: Any) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.Resize(config.image_size),
            transforms.RandomCrop(config.image_size, config.padding),
            transforms.RandomHorizontalFlip(config.hflip),
            transforms.PILToTensor(),
        ]
    )


def eval_transform(config: Any) -> Transform:
    """Return the transform: resize, centre crop, normalization."""
    crop = create_transform(
        input_size=config.image_size,
        is_training=False,
        use_prefetcher=True,
        interpolation="bilinear",
        crop_pct=config.image_size / (config.resize + 0.5),  # timm rounds image_size / crop_pct down
    )
    return Transform(crop, tuple(config.mean), tuple(config.std), config.image_size)  # type: ignore[arg-type]
