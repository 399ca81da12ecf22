"""Normalizers that change over a training: they have a buffer `progress`, the fraction of it that is done."""

from torch import Tensor, nn


def progress_buffers(model: nn.Module) -> list[Tensor]:
    """Where such layers of a model look up how far the training is, from 0 to 1; to be filled before each step.

    Buffers, so a checkpoint has them and a compiled layer reads them.
    """
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "progress"]


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tell every such layer of a model how far the training is."""
    for buffer in progress_buffers(model):
        buffer.fill_(fraction)
