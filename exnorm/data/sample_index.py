"""The labelled files of a split, as found in folders, a list file or tar files."""

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
        numbered: the labels were given as numbers, and the classes have no other names yet.
        stamps: (files, 2) in int64, bytes and time of change in ns; None if the scan did not read them. Both are -1
            for a dangling link. A time is -1 if it says nothing about later changes: it is just before the scan, after
            it, or out of range.
        spans: (files, 3) in int64 for members of tar files: index into `tars`, offset, bytes.
        tars: the paths of those tar files.
        kept_in: the file of the cache that has the result of the scan; empty if there is none.
    """

    names: Packed
    labels: np.ndarray
    classes: list[str]
    base: str
    numbered: bool = False
    stamps: np.ndarray | None = None
    spans: np.ndarray | None = None
    tars: Sequence[str] = ()
    kept_in: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, kept: np.ndarray) -> "SampleIndex":
        """Return the files for which a mask is true."""
        return replace(
            self,
            names=self.names.where(kept),
            labels=self.labels[kept],
            stamps=None if self.stamps is None else self.stamps[kept],
            spans=None if self.spans is None else self.spans[kept],
        )

    def named(self, classes: Sequence[str], *, source: str) -> "SampleIndex":
        """Return the same files, with names for their numeric labels.

        Raises:
            UserError: a label has no name; the message begins with `source`.
        """
        if len(self) and self.labels.max() >= len(classes):
            worst = int(self.labels.argmax())
            raise UserError(
                f"{source}: {self.names[worst]} has label {self.labels[worst]}. There are {len(classes)} classes, so "
                f"labels go from 0 to {len(classes) - 1}"
            )
        return replace(self, classes=list(classes), numbered=False)

    def labelled_as(self, classes: Sequence[str], *, source: str) -> "SampleIndex":
        """Return the same files, with labels that are indices into other classes, matched by name.

        Raises:
            UserError: files have a class that is not in `classes`.
        """
        places = {name: place for place, name in enumerate(classes)}
        new = np.array([places.get(name, -1) for name in self.classes], np.int32)
        labels = new[self.labels] if len(self) else self.labels
        lost = sorted({self.classes[label] for label in np.unique(self.labels[labels < 0])})
        if lost:
            raise UserError(f"{source} has {_count(len(lost), 'class')} that train lacks: {shorten(lost[:SHOWN])}")
        return replace(self, labels=labels, classes=list(classes))

    def fingerprint(self) -> str:
        """Return a hash of names, labels, classes and sizes; it does not depend on folders and times."""
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        arrays: list[Any] = [self.names.block, self.names.ends, self.labels]
        sizes = None if self.stamps is None else self.stamps[:, 0]
        for array in [*arrays, sizes, None if self.spans is None else self.spans[:, 2]]:
            digest.update(b"/" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _count(number: int, what: str) -> str:
    return f"a {what}" if number == 1 else f"{number} {what}es"
