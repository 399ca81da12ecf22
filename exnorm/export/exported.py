"""What all formats of `exnorm export` share: the model to write, and the network that was read back."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class Exported:
    """A trained model, and what is written beside it.

    Attributes:
        model: in evaluation mode, on the CPU.
        config: the config of its run.
        description: see `exnorm.engine.description`.
        example: two images of noise, (2, 3, height, width): an exported program contains its example inputs.
    """

    model: nn.Module
    config: Any
    description: dict[str, str]
    example: Tensor

    @property
    def name(self) -> str:
        """The model in words, for messages."""
        return f"model={self.config.model.name} norm={self.config.norm.name}"

    @property
    def smallest(self) -> int | None:
        """The smallest height and width that the network takes; None if they are those of the example.

        Images of segmentation have any size, from two positions of the features on: with one, torch's resizing is
        another operation.
        """
        stride = self.config.task.get("output_stride")
        return None if stride is None or min(self.example.shape[2:]) < 2 * stride else 2 * stride


class Loaded(NamedTuple):
    """A network that was read from a file.

    Attributes:
        run: returns the logits for images.
        note: what the file says about its format, after a comma.
    """

    run: Callable[[Tensor], Tensor]
    note: str = ""


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it. The caller renames it when it is checked."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
