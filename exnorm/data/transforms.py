"""Images to tensors, in timm's transforms with the papers' crop rules.

Training: random resized crop and horizontal flip, bilinear, nothing else (with `padding`, CIFAR's random crop of the
padded image). Validation: resize the shorter side to `resize`, centre crop of `image_size`, bilinear. An image stays in
uint8 until it is on the device, as with timm's prefetcher. This copies a quarter of the memory and, for small images,
halves the work of a loader.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from exnorm.data.augment import policy


@dataclass(frozen=True)
class Transform:
    """The crop of an image and the normalization of a batch.

    Attributes:
        crop: turns an image into (3, size, size) in uint8.
        mean, std: of the channels, where white is 1.
        crop_batch: turns decoded images, (images, height, width, 3) in uint8, and the seed of each into what `crop`
            makes of each image under its seed, (images, size, size, 3). None if it cannot. It is for small images,
            whose crops one by one take longer than a training step.
    """

    crop: Callable[..., Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    crop_batch: Callable[[np.ndarray, Sequence[int]], np.ndarray | None] | None = None

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
    """Return the transform: random resized crop, or random crop of the padded image; flip, normalization.

    Between flip and normalization come timm's `auto_augment` and random erasing, if they are asked for.

    Raises:
        UserError: timm does not know the policy.
    """
    behind: list[Any] = [] if config.auto_augment is None else [policy(config)]
    behind.append(transforms.PILToTensor())
    if config.random_erasing:
        mean: Any = [round(255 * channel) for channel in config.mean]
        behind.append(transforms.RandomErasing(config.random_erasing, value=mean))
    if config.padding is not None:
        padded = PaddedCrop(config.image_size, config.padding, config.hflip)
        usual = config.auto_augment is None and not config.random_erasing
        return _transform(config, transforms.Compose([padded.crop, *behind]), padded.of_batch if usual else None)
    crop: Any = create_transform(
        input_size=config.image_size,
        is_training=True,
        use_prefetcher=True,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        color_jitter=None,  # pyright: ignore[reportArgumentType]
        interpolation="bilinear",
        separate=True,
    )
    return _transform(config, transforms.Compose([crop[0], *behind]), None)


def _transform(config: Any, crop: Any, crop_batch: Any) -> Transform:
    return Transform(crop, tuple(config.mean), tuple(config.std), config.image_size, crop_batch)


class PaddedCrop:
    """CIFAR's crop: the shorter side resized to `size`, black padding, a random crop, a random horizontal flip.

    Attributes:
        crop: turns an image into its crop.
    """

    def __init__(self, size: int, padding: int, hflip: float) -> None:
        self.size, self.padding, self.hflip = size, padding, hflip
        self.crop = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.RandomCrop(size, padding),
                transforms.RandomHorizontalFlip(hflip),
            ]
        )

    def of_batch(self, pixels: np.ndarray, seeds: Sequence[int]) -> np.ndarray | None:
        """Return the crops of images of `size` pixels, each with the random numbers that its seed gives; else None."""
        images, size, pad = len(pixels), self.size, self.padding
        if pixels.shape[1:3] != (size, size):
            return None
        padded = np.zeros((images, size + 2 * pad, size + 2 * pad, 3), np.uint8)
        padded[:, pad : pad + size, pad : pad + size] = pixels
        cropped = np.empty_like(pixels)
        top = left = 0
        for place, seed in enumerate(seeds):
            torch.default_generator.manual_seed(seed)
            if pad:  # torchvision draws nothing without padding
                top, left = (int(torch.randint(2 * pad + 1, (1,))) for _ in range(2))
            crop = padded[place, top : top + size, left : left + size]
            cropped[place] = crop[:, ::-1] if torch.rand(1) < self.hflip else crop
        return cropped


def eval_transform(config: Any) -> Transform:
    """Return the transform: resize, centre crop, normalization."""
    crop = create_transform(
        input_size=config.image_size,
        is_training=False,
        use_prefetcher=True,
        interpolation="bilinear",
        crop_pct=crop_pct(config),
    )
    return _transform(config, crop, partial(_uncropped, size=config.image_size, resize=config.resize))


def crop_pct(config: Any) -> float:
    """Return the share of a resized image that validation crops, from which timm gets `resize`."""
    return config.image_size / (config.resize + 0.5)  # timm rounds image_size / crop_pct down


def _uncropped(pixels: np.ndarray, seeds: Sequence[int], *, size: int, resize: int) -> np.ndarray | None:
    """Return images from which validation crops nothing; None if it resizes or crops them."""
    return pixels if pixels.shape[1:3] == (size, size) == (resize, resize) else None
