"""Images and their masks to tensors, with torchvision's transforms for both at once.

Training: a random size, a random rotation, a random crop, a random flip, and a random blur of the image. What a crop
or a rotation takes from outside of the image has the mean colour, and its pixels are ignored. Validation: the complete
image at its own size; the task resizes it on the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from exnorm.data.splits import IGNORED
from exnorm.data.transforms import Transform

BLUR_KERNEL = 5  # px


@dataclass(frozen=True)
class MaskTransform(Transform):
    """The transform of an image and its mask, and the normalization of a batch.

    Attributes:
        crop: turns an image, and its mask if there is one, into tensors: (3, height, width) and (height, width).
        size: of the side of a crop; of validation images, about that of the shorter side.
    """

    def __call__(self, image: Image.Image, *targets: Any) -> tuple[Any, ...]:
        """Return the image, (height, width, 3) in uint8, and its mask, (height, width) in uint8."""
        pixels, mask = self.crop(*as_tensors(image, targets[0]))
        return pixels.permute(1, 2, 0).as_subclass(Tensor), mask.as_subclass(Tensor)

    @property
    def sample_bytes(self) -> int:
        """The size of a cropped image and its mask."""
        return 4 * self.size**2


def as_tensors(image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
    """Return an image as (3, height, width) and its mask as (height, width), both in uint8."""
    return tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(np.array(mask)))


def train_transform(config: Any) -> MaskTransform:
    """Return the random transform of training."""
    fill: Any = {tv_tensors.Image: [255 * value for value in config.mean], tv_tensors.Mask: IGNORED}
    steps: list[Any] = [_random_size(config)]
    if config.rotation:
        steps.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR, fill=fill))
    steps.append(v2.RandomCrop(config.image_size, pad_if_needed=True, fill=fill))
    if config.hflip:
        steps.append(v2.RandomHorizontalFlip(config.hflip))
    if config.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(BLUR_KERNEL)], config.blur))
    return _transform(config, v2.Compose(steps), config.image_size)


def _random_size(config: Any) -> Any:
    """Return the resizing: to one of some sizes of the shorter side, or to a random multiple of `resize`."""
    if config.short_sides is not None:
        return v2.RandomShortestSize(list(config.short_sides), config.long_side)
    low, high = config.zoom or (1.0, 1.0)
    return v2.RandomResize(round(config.resize * low), round(config.resize * high) + 1)


def eval_transform(config: Any) -> MaskTransform:
    """Return the transform of validation, which changes nothing."""
    return _transform(config, v2.Identity(), config.resize)


def centre_transform(config: Any) -> MaskTransform:
    """Return the transform to one size without randomness: the shorter side to `resize`, then a crop of the centre."""
    crop = v2.CenterCrop(config.image_size)  # pads smaller images with black; `resize` is usually larger
    return _transform(config, v2.Compose([v2.Resize(config.resize), crop]), config.image_size)


def _transform(config: Any, crop: Any, size: int) -> MaskTransform:
    return MaskTransform(crop, tuple(config.mean), tuple(config.std), size)  # type: ignore[arg-type]
