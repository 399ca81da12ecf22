"""CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels in 100 classes, read by torchvision.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from typing import Any

from exnorm.data import cifar
from exnorm.data.splits import Splits


def fingerprint(config: Any, *, train: bool = True) -> str:
    """See `exnorm.data.cifar.fingerprint`."""
    return cifar.fingerprint(config, "cifar-100-python")


def load(config: Any, *, train: bool = True) -> Splits:
    """Return the training and the test images."""
    return cifar.load(config, "CIFAR100", None)
