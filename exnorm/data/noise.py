"""Label noise, in the conventions of the literature; the labels depend on the rate, the kind and the seed alone.

    symmetric             int(rate * N) labels are drawn anew from all classes, their own included (DivideMix, Li et al.
                          2020): of them 1 - 1/C are wrong
    symmetric_exclusive   the same from all other classes: all of them are wrong
    asymmetric            int(rate * N) labels become the class that theirs is mistaken for: the pairs that a data set
                          names (those of CIFAR-10: Patrini et al. 2017), else the next class
    file                  all labels are those of `data.noise.file`, such as labels that people gave (CIFAR-10N, Wei et
                          al. 2022). `exnorm.data.noise_file` says what it holds

A class that no other is made of, as CIFAR-10's frog, keeps its labels.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exnorm.config.errors import UserError, suggest
from exnorm.config.options import written
from exnorm.data import noise_file
from exnorm.data.splits import Images, Splits

FILE = "file"
KINDS = ("none", "symmetric", "symmetric_exclusive", "asymmetric", FILE)


def check(config: Any) -> None:
    """Refuse a kind, rate or file that cannot be.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if config.kind not in KINDS:
        raise UserError(f"data.noise.kind={config.kind}: {suggest(config.kind, KINDS)}")
    if (config.kind == FILE) != (config.file is not None):
        raise UserError(
            f"data.noise.kind={config.kind} with data.noise.file={written(config.file)}: give both, as in "
            "data.noise.kind=file data.noise.file=labels.csv, or neither"
        )
    if config.kind == FILE and config.rate == 0:
        return
    if config.kind == FILE:
        raise UserError(f"data.noise.rate={config.rate}: the file says which labels are wrong. Leave the rate out")
    if not 0 <= config.rate <= 1:
        raise UserError(f"data.noise.rate={config.rate}: a share of the labels, from 0 to 1")
    if (config.kind == "none") != (config.rate == 0):
        raise UserError(
            f"data.noise.kind={config.kind} with data.noise.rate={config.rate} adds no noise; give both, as in "
            "data.noise.kind=symmetric data.noise.rate=0.4, or data.noise.kind=none data.noise.rate=0"
        )


def is_on(config: Any) -> bool:
    """Return whether labels are changed."""
    return config.kind != "none"


def with_noise(splits: Splits, data_config: Any) -> Splits:
    """The same sets with noise in the labels of the training images; validation stays clean."""
    config = data_config.noise
    if not is_on(config) or not len(splits.train):
        return splits
    assert isinstance(splits.train, Images)  # `exnorm.data.fingerprint` refuses noise for masks
    if config.kind == FILE:
        return replace(splits, train=noise_file.labelled(splits.train, splits.classes, data_config))
    clean, classes = np.asarray(splits.train.labels).tolist(), len(splits.classes)
    mistaken_for = splits.mistaken_for or [(label + 1) % classes for label in range(classes)]
    rng = random.Random(config.seed)
    labels = clean.copy()
    for index in _shuffled(len(clean), rng)[: int(config.rate * len(clean))]:
        if config.kind == "asymmetric":
            labels[index] = mistaken_for[clean[index]]
        elif config.kind == "symmetric":
            labels[index] = int(rng.random() * classes)
        else:
            labels[index] = (clean[index] + 1 + int(rng.random() * (classes - 1))) % classes
    return replace(
        splits, train=replace(splits.train, labels=np.array(labels, np.int32), clean_labels=np.array(clean, np.int32))
    )


def _shuffled(count: int, rng: random.Random) -> list[int]:
    """The numbers below `count` in a random order: each draws a number, and the draws are sorted.

    `random.shuffle` could draw differently in another version of Python. `random.random` may not, by its documentation.
    """
    draws = [rng.random() for _ in range(count)]
    return sorted(range(count), key=lambda index: draws[index])


def wrong_labels(images: Images) -> list[tuple[int, int, int]]:
    """(index, clean label, noisy label) of each image whose label noise has changed."""
    clean = images.labels if images.clean_labels is None else images.clean_labels
    both = enumerate(zip(clean, images.labels, strict=True))
    return [(index, before, after) for index, (before, after) in both if before != after]


def as_csv(wrong: Sequence[tuple[int, int, int]]) -> str:
    """The wrong labels as text, one row each."""
    return "".join(["index,clean,noisy\n", *[f"{index},{clean},{noisy}\n" for index, clean, noisy in wrong]])


def facts(config: Any, images: Images) -> dict[str, Any]:
    """What a record says of the noise: what was asked for, how many labels are wrong, and the hash of them."""
    wrong = wrong_labels(images)
    return {
        "kind": config.kind,
        **({} if config.kind == FILE else {"rate": config.rate, "seed": config.seed}),
        "wrong_labels": len(wrong),
        "images": len(images),
        "sha256": hashlib.sha256(as_csv(wrong).encode()).hexdigest(),
    }
