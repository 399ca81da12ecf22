"""Normalizers that depend on the progress of training: their buffer `progress` holds the completed fraction."""

from torch import Tensor, nn


def progress_buffers(model: nn.Module) -> list[Tensor]:
    """Return the `progress` buffers of a model. Fill them before each step with the completed fraction, 0 to 1.

    They are buffers, so a checkpoint has them and a compiled layer reads them.
    """
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "progress"]


def set_progress(model: nn.Module, fraction: float) -> None:
    """Set all `progress` buffers of a model to the completed fraction of the training."""
    for buffer in progress_buffers(model):
        buffer.fill_(fraction)
