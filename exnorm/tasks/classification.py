"""Classification: cross-entropy, top-1 and top-5.

Metrics are sums over samples, divided by the number of samples at the end. A mean of batch means is not the mean.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.data.transforms import Transform, eval_transform, train_transform
from exnorm.models import classifier
from exnorm.tasks.base import Purpose, Task, ranked

LOSSES = ("cross_entropy", "bce")
USUAL = {"loss": LOSSES[0], "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}  # where a yaml of one's own lacks them


class Classification(Task):
    """One label per image. The targets are the label and, as labels may be noisy, the clean label.

    With fewer than 5 classes top-5 is top-k over all of them, which is 100 %.
    """

    sum_count = 7  # loss, top-1, top-5, samples; wrong labels, and of them those fitted and those recovered

    def __init__(self, config: Any, classes: Sequence[str]) -> None:
        super().__init__(config, classes)
        loss, smoothing, mixup, cutmix = (config.get(key, usual) for key, usual in USUAL.items())
        if loss not in LOSSES:
            raise UserError(f"task.loss={loss} is unknown; allowed: {', '.join(LOSSES)}")
        if not 0 <= smoothing <= 1:
            raise UserError(f"task.label_smoothing={smoothing:g} is not possible; give a number from 0 to 1")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise UserError(f"task.{name}={alpha:g} is not possible; give a number from 0 up")
        self.criterion = (
            nn.CrossEntropyLoss(label_smoothing=smoothing)
            if loss == LOSSES[0]
            else BinaryCrossEntropy(smoothing=smoothing)
        )
        # Cross entropy smooths mixed labels itself; timm's binary cross entropy takes them as they are.
        smoothed = 0.0 if loss == LOSSES[0] else smoothing
        self.mix: Mixup | None = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=smoothed, num_classes=len(self.classes))

    def network(self, model_config: Any) -> nn.Module:
        """Return the backbone with one output for each class."""
        return classifier(model_config, num_classes=len(self.classes))

    def transform(self, data_config: Any, purpose: Purpose) -> Transform:
        """Return the crop rule of the papers."""
        return train_transform(data_config) if purpose == "train" else eval_transform(data_config)

    def prepared(self, data_config: Any, image: Image.Image) -> Tensor:
        """Return the crop of the centre."""
        return eval_transform(data_config)(image)[0]

    def likely(self, output: Tensor) -> list[tuple[str, float]]:
        """Return the classes with their probabilities."""
        return ranked(self.classes, torch.softmax(output[0].double(), 0))

    def mixed(self, images: Tensor, targets: Sequence[Tensor], *, seeds: Iterable[int]) -> tuple[Tensor, ...]:
        """Mix the images of each replica by mixup or cutmix, in place; the mixed labels are a third target."""
        if self.mix is None:
            return images, *targets
        (labels, clean), of_replicas, shares = targets, list(seeds), []
        count = len(of_replicas)
        for seed, part, part_labels in zip(of_replicas, images.chunk(count), labels.chunk(count), strict=True):
            np.random.seed(seed % 2**32)  # timm draws from numpy's generator
            shares.append(self.mix(part, part_labels)[1])
        return images, labels, clean, torch.cat(shares)

    def loss(self, output: Tensor, targets: Sequence[Tensor], *, replicas: int, group: Any = None) -> Tensor:
        """Return the mean loss over the samples, in float32. Replicas have equal numbers of them."""
        labels, _, *mixed = targets
        return self.criterion(output.float(), mixed[0] if mixed else labels)

    @torch.no_grad()
    def sums(self, output: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Return sums over the samples, in float64. Some labels may be wrong; a mixed image has its first label.

        The sums are the cross entropy without smoothing, hits in top 1 and in top 5, the number of samples, and that of
        wrong labels. Of the wrong labels: those that the prediction agrees with (fitted), and those for which it is the
        clean label (recovered).
        """
        logits, (labels, clean, *_) = output.detach().float(), targets
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        noisy = labels != clean
        parts = (
            loss,
            ranked[:, 0].sum(),
            ranked.any(1).sum(),
            labels.new_full((), len(labels)),  # no copy from the host, for which a GPU would wait
            noisy.sum(),
            (ranked[:, 0] & noisy).sum(),
            (noisy & (logits.argmax(1) == clean)).sum(),
        )
        return torch.stack([part.double() for part in parts])

    def summarize(self, sums: Tensor) -> dict[str, float]:
        """Return loss, and top-1 and top-5 in percent.

        If labels are wrong: also the percentages of them that were fitted and recovered.
        """
        loss, top1, top5, count, noisy, fitted, recovered = sums.tolist()
        metrics = {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
        if noisy:
            metrics |= {"noisy_fitted": 100 * fitted / noisy, "noisy_recovered": 100 * recovered / noisy}
        return metrics
