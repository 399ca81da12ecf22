"""Broken training images: each is replaced by another image and listed; too many of them end the run.

WebVision has truncated files, and error pages named `.jpg`. In training, the next good image of the same label
replaces a broken one; with masks, the next good image. Every loader process appends the broken images that it finds to
one file of the run folder.
"""

import csv
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data.files import BadImage
from exnorm.data.paths import BAD_IMAGES
from exnorm.data.splits import Samples
from exnorm.runs.folder import write_text_atomic
from exnorm.runs.metrics import append_text
from exnorm.runs.sinks import csv_text

Row = tuple[str, ...]


class BadImages:
    """The broken images of one data set in the training of one run.

    Args:
        file: a CSV with the columns data, index, path, reason; other processes also write to it.
        data: the name of the set.
        images: how many images the set has.
        max_fraction: the share of them that may be broken.
    """

    def __init__(self, file: Path, *, data: str, images: int, max_fraction: float) -> None:
        self.file, self.data, self.images, self.max_fraction = file, data, images, max_fraction
        self.seen_bytes = 0
        self.bad: dict[int, int] = {}  # broken image: its replacement

    def open(self, images: Samples, index: int) -> tuple[Any, ...]:
        """Return image `index` with its targets, or the next good image that may replace it.

        Raises:
            UserError: no such image is good.
        """
        chosen = self.bad.get(index, index)
        try:
            return images.open(chosen)
        except BadImage as bad:
            self._note(chosen, bad)
            example = bad
        others = images.replacements(index)
        for other in others:
            try:
                sample = images.open(int(other))
            except BadImage as bad:
                self._note(int(other), bad)
                continue
            self.bad[index] = int(other)
            return sample
        alike, such = f"{len(others) + 1} {images.described(index)}", f"{example.name} ({example.reason})"
        raise UserError(f"{self.data}: all {alike} are broken, such as {such}")

    def _note(self, index: int, bad: BadImage) -> None:
        head = [] if self.file.exists() else [BAD_IMAGES]  # two processes may both write it; `_all_rows` drops it
        append_text(self.file, csv_text([*head, (self.data, index, bad.name, bad.reason)]))

    def check(self) -> None:
        """Count the broken images in the file, if its size has changed.

        Raises:
            UserError: more images are broken than `max_fraction` allows.
        """
        size = self.file.stat().st_size if self.file.exists() else 0
        if size == self.seen_bytes:
            return
        self.seen_bytes = size
        rows = self.rows()
        if len(rows) > self.max_fraction * self.images:
            _, _, path, reason = rows[0]
            raise UserError(
                f"{len(rows)} of {self.images} training images of {self.data} are broken, such as {path} ({reason}); "
                f"data.max_bad_fraction={self.max_fraction:g} allows {int(self.max_fraction * self.images)}. "
                f"{self.file} lists them. To continue this run, allow more. For a new run, repair them or leave them "
                f"out with data.exclude={self.file}"
            )

    def rows(self) -> list[Row]:
        """Return (data, index, path, reason) of each broken image of this set, sorted by index."""
        return [row for row in self._all_rows() if row[0] == self.data]

    def look_again(self, images: Samples) -> None:
        """Remove the listed images that can be read now. Only one process calls this, before the others start."""
        if self.file.exists():
            rows = [row for row in self._all_rows() if row[0] != self.data or _is_broken(images, int(row[1]))]
            write_text_atomic(self.file, csv_text([BAD_IMAGES, *rows]))

    def tidy(self) -> None:
        """Rewrite the file with each image once, sorted by index. Only one process calls this, at the end."""
        if self.file.exists():
            write_text_atomic(self.file, csv_text([BAD_IMAGES, *self._all_rows()]))

    def _all_rows(self) -> list[Row]:
        if not self.file.exists():
            return []
        with self.file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            rows = {tuple(row[:2]): tuple(row) for row in csv.reader(lines) if len(row) == len(BAD_IMAGES)}
        rows.pop(BAD_IMAGES[:2], None)
        return sorted(rows.values(), key=lambda row: (row[0], int(row[1])))


def _is_broken(images: Samples, index: int) -> bool:
    try:
        images.open(index)
    except BadImage:
        return True
    return False
