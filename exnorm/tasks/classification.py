"""Classification: cross-entropy, top-1 and top-5.

Metrics are sums over samples, divided by the number of samples at the end. A mean of batch means is not the mean.
"""

from typing import Any

import torch
from torch import Tensor, nn

SUMS = ("loss", "top1", "top5", "count", "noisy", "noisy_fitted", "noisy_recovered")


class Classification:
    """Criterion and metrics of a classification run.

    With fewer than 5 classes top-5 is top-k over all of them, which is 100 %.
    """

    def __init__(self, config: Any) -> None:
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the samples, in float32."""
        return self.criterion(logits.float(), labels)

    @torch.no_grad()
    def sums(self, logits: Tensor, labels: Tensor, clean: Tensor) -> Tensor:
        """Return sums over the samples, in float64. Some labels may be wrong.

        The sums are the loss without smoothing, hits in top 1 and in top 5, the number of samples, and the number of
        wrong labels. Of the wrong labels: those that the prediction agrees with (fitted), and those for which it is the
        clean label (recovered).
        """
        logits = logits.float()
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


def summarize(sums: Tensor, split: str) -> dict[str, float]:
    """Return sums as metrics under `<split>/`: loss, and top-1 and top-5 in percent.

    If labels are wrong: also the percentages of them that were fitted and recovered.
    """
    loss, top1, top5, count, noisy, fitted, recovered = sums.tolist()
    metrics = {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
    if noisy:
        metrics |= {"noisy_fitted": 100 * fitted / noisy, "noisy_recovered": 100 * recovered / noisy}
    return {f"{split}/{name}": value for name, value in metrics.items()}
