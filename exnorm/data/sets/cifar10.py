"""CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes, read by torchvision.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from typing import Any

from exnorm.data import cifar
from exnorm.data.splits import Splits

# Patrini et al., CVPR 2017: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse; the others stay.
MISTAKEN_FOR = [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]


def fingerprint(config: Any, *, train: bool = True) -> str:
    """See `exnorm.data.cifar.fingerprint`."""
    return cifar.fingerprint(config, "cifar-10-batches-py")


def load(config: Any, *, train: bool = True) -> Splits:
    """Return the training and the test images."""
    return cifar.load(config, "CIFAR10", MISTAKEN_FOR)
