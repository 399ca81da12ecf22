"""Normalizers that change over a training: they have a buffer `progress`, the fraction of it that is done."""

from torch import nn


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tell every such layer of a model how far the training is, from 0 to 1; before each optimizer step.

    It is a buffer, so a checkpoint has it and a compiled layer reads it.
    """
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "progress":
            buffer.fill_(fraction)
