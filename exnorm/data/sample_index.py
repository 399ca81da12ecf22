"""The labelled files of a split: what a scan of folders, a list file or a scan of tar files finds."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exnorm.config.errors import UserError, shorten
from exnorm.data.packed import Packed

SHOWN = 3


@dataclass(frozen=True)
class SampleIndex:
    """Files and their labels.

    Attributes:
        names: paths relative to `base`, or the names of members of tar files.
        labels: (files,) in int32, indices into `classes`.
        base: the folder that the names are relative to.
        numbered: the labels came as numbers, which are the names of the classes so far.
        sizes: (files,) bytes, where the scan saw them.
        spans: (files, 3) in int64 for members of tar files: which one, offset, bytes.
        tars: the paths of those tar files.
    """

    names: Packed
    labels: np.ndarray
    classes: list[str]
    base: str
    numbered: bool = False
    sizes: np.ndarray | None = None
    spans: np.ndarray | None = None
    tars: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, kept: np.ndarray) -> "SampleIndex":
        """The files whose place in a mask is true."""
        return replace(
            self,
            names=self.names.where(kept),
            labels=self.labels[kept],
            sizes=None if self.sizes is None else self.sizes[kept],
            spans=None if self.spans is None else self.spans[kept],
        )

    def named(self, classes: Sequence[str], *, source: str) -> "SampleIndex":
        """The same labels, which are numbers so far, with names.

        Raises:
            UserError: a label without a name; `source` says where the labels are from.
        """
        if len(self) and self.labels.max() >= len(classes):
            worst = int(self.labels.argmax())
            raise UserError(
                f"{source}: label {self.labels[worst]} of {self.names[worst]}, and there are {len(classes)} classes, "
                f"so labels go from 0 to {len(classes) - 1}"
            )
        return replace(self, classes=list(classes), numbered=False)

    def labelled_as(self, classes: Sequence[str], *, source: str) -> "SampleIndex":
        """The same files with labels that are indices into other classes, matched by name.

        Raises:
            UserError: a class with files that the others lack.
        """
        places = {name: place for place, name in enumerate(classes)}
        new = np.array([places.get(name, -1) for name in self.classes], np.int32)
        labels = new[self.labels] if len(self) else self.labels
        lost = sorted({self.classes[label] for label in np.unique(self.labels[labels < 0])})
        if lost:
            raise UserError(f"{source} has {_count(len(lost), 'class')} that train lacks: {shorten(lost[:SHOWN])}")
        return replace(self, labels=labels, classes=list(classes))

    def fingerprint(self) -> str:
        """A hash of names, labels, classes and sizes; the same wherever the files lie."""
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        arrays: list[Any] = [self.names.block, self.names.ends, self.labels]
        for array in [*arrays, self.sizes, None if self.spans is None else self.spans[:, 2]]:
            digest.update(b"/" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _count(number: int, what: str) -> str:
    return f"a {what}" if number == 1 else f"{number} {what}es"
