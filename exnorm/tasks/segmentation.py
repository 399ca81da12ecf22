"""Semantic segmentation: a class for every pixel, cross-entropy over the pixels that have one, and mIoU.

Loss of R replicas: (1/R) sum_r (sum over the valid pixels i of replica r of CE_i) / max(1, valid pixels of r). This is
the mean over GPUs of each GPU's cross-entropy, on any number of devices and passes. An auxiliary head adds
`aux_weight` times the same.

Metrics come from the confusion matrix n_ij, the pixels of class i that are predicted as j, summed over all images:

    IoU_i = n_ii / (sum_j n_ij + sum_j n_ji - n_ii),   mIoU: mean over the classes that occur in the masks
    pixel accuracy = sum_i n_ii / sum_ij n_ij,         mean accuracy: mean of n_ii / sum_j n_ij over those classes

Source of loss weights and protocols: P. Luo et al., "Switchable Normalization", TPAMI 2019, and its code; H. Zhao et
al., "Pyramid Scene Parsing Network", CVPR 2017.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.transforms.functional import resize

from exnorm.config.errors import UserError
from exnorm.config.schema import WHOLE
from exnorm.data import mask_transforms
from exnorm.data.splits import IGNORED
from exnorm.data.transforms import Transform
from exnorm.models import segmentation_network
from exnorm.tasks.base import Purpose, Task, Views, ranked

LOSS_AT = ("image", "head")
STRIDE = 2 / 3  # of a sliding window, as a share of its side


class Segmentation(Task):
    """A class for every pixel. The target is a mask, (N, height, width) in uint8, with 255 for pixels without a class.

    In training the network returns a tuple of logits: those of the head and, if there is one, of the auxiliary head.
    """

    def __init__(self, config: Any, classes: Sequence[str]) -> None:
        super().__init__(config, classes)
        if config["loss_at"] not in LOSS_AT or config["aux_weight"] < 0:
            raise UserError(
                f"task.loss_at={config['loss_at']} task.aux_weight={config['aux_weight']:g}: loss_at can be "
                f"{' or '.join(LOSS_AT)}, and aux_weight 0 or more"
            )
        self.sum_count = 2 + len(self.classes) ** 2  # loss, pixels, confusion matrix

    def network(self, model_config: Any) -> nn.Module:
        """Return the backbone with a head, and with an auxiliary head if its loss counts."""
        return segmentation_network(
            model_config,
            num_classes=len(self.classes),
            output_stride=self.config["output_stride"],
            aux=self.config["aux_weight"] > 0,
        )

    def transform(self, data_config: Any, purpose: Purpose) -> Transform:
        """Return the transform of an image and its mask."""
        makers = {
            "train": mask_transforms.train_transform,
            "eval": mask_transforms.eval_transform,
            "centre": mask_transforms.centre_transform,
        }
        return makers[purpose](data_config)

    def prepared(self, data_config: Any, image: Image.Image) -> Tensor:
        """Return the complete image, with the shorter side at `data.resize`."""
        small: Any = resize(image, [data_config.resize])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        return as_pixels(small)

    def likely(self, output: Tensor) -> list[tuple[str, float]]:
        """Return the classes with their shares of the pixels."""
        counts = output[0].argmax(0).flatten().bincount(minlength=len(self.classes))
        return ranked(self.classes, counts / counts.sum())

    def loss(self, output: Any, targets: Sequence[Tensor], *, replicas: int, group: Any = None) -> Tensor:
        """Return the mean over replicas of the cross-entropy over the valid pixels of each, in float32."""
        weights = (1.0, self.config["aux_weight"])
        losses = [
            weight * replica_mean(*self._fitted(logits, targets[0]), replicas=replicas, group=group)
            for weight, logits in zip(weights, output, strict=False)
        ]
        return torch.stack(losses).sum()

    def _fitted(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and mask at the same size: that of the mask, or that of the logits with the nearest pixels."""
        logits = logits.float()
        if self.config["loss_at"] == "image":
            return upsampled(logits, mask.shape[-2:]), mask
        return logits, nearest(mask, logits.shape[-2:])

    @torch.no_grad()
    def sums(self, output: Any, targets: Sequence[Tensor]) -> Tensor:
        """Return the summed cross-entropy, the valid pixels and the confusion matrix, in float64.

        Training is scored at the resolution of the head, validation at that of the masks. The matrix is counted in
        int64, so that it stays exact, and without a value that the device would have to send to the host.
        """
        logits = (output[0] if isinstance(output, tuple) else output).detach().float()
        mask = nearest(targets[0], logits.shape[-2:]).long()
        count = len(self.classes)
        loss = cross_entropy(by_pixel(logits), mask.flatten(), ignore_index=IGNORED, reduction="sum")
        valid = mask != IGNORED
        pairs = torch.where(valid, mask * count + logits.argmax(1), count * count)  # one more bin for ignored pixels
        matrix = torch.zeros(count * count + 1, dtype=torch.int64, device=mask.device)
        matrix.scatter_add_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
        return torch.cat([torch.stack([loss.double(), valid.sum().double()]), matrix[:-1].double()])

    def summarize(self, sums: Tensor) -> dict[str, float]:
        """Return mIoU, accuracies and the IoU of every class in percent, the loss, and the classes that do not occur.

        A class that does not occur in the masks has no IoU (NaN), and no mean counts it.
        """
        loss, pixels = sums[:2].tolist()
        matrix = sums[2:].reshape(len(self.classes), -1)
        hits, in_mask, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        occurs = in_mask > 0
        iou = torch.where(occurs, 100 * hits / (in_mask + predicted - hits), torch.nan)
        accuracy = torch.where(occurs, 100 * hits / in_mask, torch.nan)
        pixels = max(1.0, pixels)
        each = {f"iou/{in_key(name)}": value for name, value in zip(self.classes, iou.tolist(), strict=True)}
        return {
            "loss": loss / pixels,
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(100 * hits.sum() / pixels),
            "mean_accuracy": float(accuracy.nanmean()),
            "undefined_classes": float((~occurs).sum()),
            **each,
        }

    def predict(self, model: nn.Module, images: Tensor, size: Sequence[int], views: Views) -> Tensor:
        """Return the logarithm of the class probabilities of every pixel, (N, C, height, width) of `size`.

        The probabilities are the mean over scales and flips. Logits of sliding windows are averaged before. Images are
        never padded, because normalizers that look at one image would see the padding.
        """
        seen = [(scale, flipped) for scale in views.scales for flipped in (False, True)[: 1 + views.flip]]
        mean = torch.zeros((), device=images.device)
        for scale, flipped in seen:
            view = resized(images, round(views.resize * scale))
            logits = self._logits(model, view.flip(-1) if flipped else view, views.window)
            shares = upsampled(logits, size).softmax(1)
            mean = mean + (shares.flip(-1) if flipped else shares) / len(seen)
        return mean.clamp(min=torch.finfo(torch.float32).tiny).log()

    def _logits(self, model: nn.Module, images: Tensor, side: int | None) -> Tensor:
        """Return the logits of complete images, at the size of the head, or those of their windows, at their size.

        Args:
            side: of a window.
        """
        if side is None:
            return model(images).float()
        height, width = images.shape[-2:]
        if side > min(height, width):
            raise UserError(
                f"test.window={side} is larger than an image of {height} x {width} px. Give at most "
                f"{min(height, width)}, or test.window={WHOLE}"
            )
        total = torch.zeros(len(images), len(self.classes), height, width, device=images.device)
        visits = torch.zeros(height, width, device=images.device)
        for top in starts(height, side):
            for left in starts(width, side):
                place = (..., slice(top, top + side), slice(left, left + side))
                total[place] += upsampled(model(images[place]).float(), (side, side))
                visits[place] += 1
        return total / visits


def replica_mean(logits: Tensor, mask: Tensor, *, replicas: int, group: Any) -> Tensor:
    """Return the mean over replicas of (sum of cross-entropies / valid pixels) of each.

    Args:
        logits: (N, C, height, width), with equal shares of consecutive images for each replica.
        group: the processes that share the one replica; its valid pixels are counted over all of them. The engine
            averages over processes, so the part of a process is multiplied by their number.
    """
    each = cross_entropy(by_pixel(logits), mask.long().flatten(), ignore_index=IGNORED, reduction="none")
    sum_R = each.reshape(replicas, -1).sum(1)
    valid_R = (mask != IGNORED).reshape(replicas, -1).sum(1).to(sum_R.dtype)
    processes = 1
    if group is not None:
        dist.all_reduce(valid_R, group=group)
        processes = dist.get_world_size(group)
    return processes * (sum_R / valid_R.clamp(min=1)).mean()


def as_pixels(image: Image.Image) -> Tensor:
    """Return an image as (height, width, 3) in uint8."""
    return torch.from_numpy(np.array(image))


def by_pixel(logits: Tensor) -> Tensor:
    """Return (N, C, height, width) as (pixels, C), for which cross-entropy has a deterministic form on a GPU."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits at another size, bilinear."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def nearest(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Return a mask at another size, with the value of the nearest pixel."""
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return interpolate(mask[:, None], tuple(size), mode="nearest-exact")[:, 0]


def resized(images: Tensor, short_side: int) -> Tensor:
    """Return images with another length of the shorter side, bilinear and antialiased."""
    height, width = images.shape[-2:]
    factor = short_side / min(height, width)
    if factor == 1:
        return images
    size = (round(height * factor), round(width * factor))
    return interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def starts(length: int, side: int) -> list[int]:
    """Return where windows of `side` px begin, so that they cover `length` px; the last one ends at the border."""
    step = max(1, int(side * STRIDE))
    return sorted({*range(0, length - side, step), length - side})


def in_key(name: str) -> str:
    """Return the name of a class as one part of the name of a metric."""
    return name.replace("/", "-").replace(" ", "_")
