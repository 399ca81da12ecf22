"""Classification: cross-entropy, top-1 and top-5.

Metrics are sums over samples, divided by the number of samples at the end. A mean of batch means is not the mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from exnorm.data.transforms import Transform, eval_transform, train_transform
from exnorm.models import classifier
from exnorm.tasks.base import Purpose, Task, ranked


class Classification(Task):
    """One label per image. The targets are the label and, as labels may be noisy, the clean label.

    With fewer than 5 classes top-5 is top-k over all of them, which is 100 %.
    """

    sum_count = 7  # loss, top-1, top-5, samples; wrong labels, and of them those fitted and those recovered

    def __init__(self, config: Any, classes: Sequence[str]) -> None:
        super().__init__(config, classes)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"])

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

    def loss(self, output: Tensor, targets: Sequence[Tensor], *, replicas: int, group: Any = None) -> Tensor:
        """Return the mean loss over the samples, in float32. Replicas have equal numbers of them."""
        return self.criterion(output.float(), targets[0])

    @torch.no_grad()
    def sums(self, output: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Return sums over the samples, in float64. Some labels may be wrong.

        The sums are the loss without smoothing, hits in top 1 and in top 5, the number of samples, and the number of
        wrong labels. Of the wrong labels: those that the prediction agrees with (fitted), and those for which it is the
        clean label (recovered).
        """
        logits, (labels, clean) = output.detach().float(), targets
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
