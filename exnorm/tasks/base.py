"""The interface of a task.

A task says what the network puts out, what is minimized, and how the network is scored. The engine trains, validates,
saves and logs any task in the same way. `docs/own-task.md` shows how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from exnorm.config.metrics import declared
from exnorm.config.schema import WHOLE
from exnorm.data.transforms import Transform

# How an image is prepared: for training; for validation; or cropped to one size without randomness, to measure ratios
# and to calibrate BN's statistics.
Purpose = Literal["train", "eval", "centre"]


@dataclass(frozen=True)
class Views:
    """What of a test image a segmentation network sees. The predictions of all views are averaged.

    Attributes:
        resize: px of the shorter side at scale 1.
        scales: factors on `resize`.
        flip: also the mirrored image.
        window: side in px of a sliding window; None for the complete image.
    """

    resize: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None

    @property
    def described(self) -> str:
        """The views in words: `scales 0.75, 1; flip; windows of 64 px`."""
        scales = [f"scales {', '.join(f'{scale:g}' for scale in self.scales)}"] if self.scales != (1.0,) else []
        flip = ["flip"] if self.flip else []
        window = [f"windows of {self.window} px"] if self.window else []
        return "; ".join([*scales, *flip, *window])

    @classmethod
    def of(cls, data_config: Any, test_config: Any) -> "Views":
        """Return the views that `data.resize` and `test` ask for."""
        window = None if test_config.window == WHOLE else int(test_config.window)
        return cls(data_config.resize, tuple(test_config.scales), test_config.flip, window)


class Task(ABC):
    """What a run learns.

    Args:
        config: the options of `conf/task/<name>.yaml`.
        classes: the names of the classes.

    Attributes:
        metrics: the metrics that the yaml declares, the primary one first.
        sum_count: the length of `sums`.
        has_rows: whether metrics need a row of numbers for each sample, because they are no function of sums.
    """

    sum_count: int
    has_rows = False

    def __init__(self, config: Any, classes: Sequence[str]) -> None:
        self.config = config
        self.classes = list(classes)
        self.metrics = declared(config["metrics"])

    @abstractmethod
    def network(self, model_config: Any) -> nn.Module:
        """Return the backbone with its head, before its norms are replaced.

        Raises:
            UserError: an unknown name, or an option that the network does not have.
        """

    @abstractmethod
    def transform(self, data_config: Any, purpose: Purpose) -> Transform:
        """Return the transform of an image and, where that is an image too, of its target."""

    def mixed(self, images: Tensor, targets: Sequence[Tensor], *, seeds: Iterable[int]) -> tuple[Tensor, ...]:
        """Return the samples that a training step learns from: images and their targets, here as they are.

        Args:
            seeds: one for each replica, each of which has an equal share of consecutive samples. A task that mixes
                samples stays within a replica, so that the result does not depend on the number of devices.
        """
        return images, *targets

    @abstractmethod
    def loss(self, output: Any, targets: Sequence[Tensor], *, replicas: int, group: Any = None) -> Tensor:
        """Return the loss of one forward pass in training: the mean over replicas of the loss of each.

        Args:
            output: what the network returned in training mode.
            targets: those of the samples, without the images.
            replicas: virtual replicas in this pass; each has an equal share of consecutive samples.
            group: the processes that share the one replica of this pass. None if one process has all of it. The
                engine then averages the losses of all processes.
        """

    @abstractmethod
    def sums(self, output: Any, targets: Sequence[Tensor]) -> Tensor:
        """Return sums over the samples, `sum_count` numbers in float64.

        They are added over batches, passes and processes. `output` is that of training, or of `predict`. The device
        must not wait for the host.
        """

    @abstractmethod
    def summarize(self, sums: Tensor) -> dict[str, float]:
        """Return added sums as metrics by their names: at least `loss` and the declared ones. NaN is not defined."""

    def predict(self, model: nn.Module, images: Tensor, size: Sequence[int], views: Views) -> Any:
        """Return the output for a batch of validation images.

        Args:
            size: height and width at which the output is scored, where it has these: those of the masks.
            views: what of an image the network sees.
        """
        return model(images)

    @abstractmethod
    def prepared(self, data_config: Any, image: Image.Image) -> Tensor:
        """Return one image as the network takes it from a validation set, (height, width, 3) in uint8."""

    @abstractmethod
    def likely(self, output: Any) -> list[tuple[str, float]]:
        """Return the classes that `predict` found in one image, with their shares of 1, the largest share first."""

    def rows(self, output: Any, targets: Sequence[Tensor]) -> Tensor:
        """Return a row of numbers for each sample, for metrics that are no function of sums, such as AP."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def summarize_rows(self, rows: Tensor) -> dict[str, float]:
        """Return the metrics that need the rows of all samples, which are in the order of the set."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")


def ranked(classes: Sequence[str], shares: Tensor) -> list[tuple[str, float]]:
    """Return classes with their shares, the largest share first."""
    names, order = list(classes), shares.argsort(descending=True, stable=True)
    return [(names[int(label)], float(shares[label])) for label in order]


def named(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """Return metrics with `<split>/` before their names."""
    return {f"{split}/{name}": value for name, value in metrics.items()}


def zero_sums(task: Task, device: torch.device) -> Tensor:
    """Return the sums over no samples."""
    return torch.zeros(task.sum_count, dtype=torch.float64, device=device)
