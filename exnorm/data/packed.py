"""Millions of file names in little memory: one block of bytes, and the end of each name.

The 1.3 million names of ImageNet take 50 MB, a third of a list of strings. Forked processes share this memory, because
reading a name writes no reference count into it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Packed(Sequence[str]):
    """A sequence of file names, stored as the bytes that the file system uses."""

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Packed":
        """Return the packed form of some names."""
        block, ends = bytearray(), []
        for name in names:
            block += name
            ends.append(len(block))
        return cls(np.frombuffer(bytes(block), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, index: int) -> bytes:
        """Return name `index` in bytes."""
        start = self.ends[index - 1] if index else 0
        return self.block[start : self.ends[index]].tobytes()

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices are not needed
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        return os.fsdecode(self.raw(index))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def where(self, kept: np.ndarray) -> "Packed":
        """Return the names for which a mask is true."""
        lengths = np.diff(self.ends, prepend=0)
        return Packed(self.block[np.repeat(kept, lengths)], np.cumsum(lengths[kept]))
