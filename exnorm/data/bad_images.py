"""Broken training images: what stands in for them, where they are listed, and when there are too many.

WebVision holds truncated files, and pages of errors named `.jpg`. In training the next good image of the same label
takes the place of a broken one; every loader process appends what it finds to one file of the run folder.
"""

import csv
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.files import BadImage
from exnorm.data.splits import Images

COLUMNS = ("data", "path", "reason")


class BadImages:
    """The broken images of one data set in the training of one run.

    Args:
        file: a CSV with the columns data, path, reason; other processes write into it too.
        data: the name of the set.
        images: how many images the set has.
        max_fraction: the share of them that may be broken.
    """

    def __init__(self, file: Path, *, data: str, images: int, max_fraction: float) -> None:
        self.file, self.data, self.images, self.max_fraction = file, data, images, max_fraction
        self.seen_bytes = 0
        self.bad: dict[int, int] = {}  # broken image: what stands in for it

    def open_image(self, images: Images, index: int) -> tuple[int, Image.Image]:
        """Image `index`, or the next good one of its label: which one it is, and the image.

        Raises:
            UserError: none is good.
        """
        try:
            chosen = self.bad.get(index, index)
            return chosen, images.open_image(chosen)
        except BadImage as bad:
            self._note(bad)
        alike = np.flatnonzero(np.asarray(images.labels) == images.labels[index])
        first = int(np.searchsorted(alike, index, side="right"))
        for other in [*alike[first:], *alike[:first]][:-1]:
            try:
                image = images.open_image(int(other))
            except BadImage as bad:
                self._note(bad)
                continue
            self.bad[index] = int(other)
            return int(other), image
        raise UserError(f"data={self.data}: all {len(alike)} images of label {images.labels[index]} are broken")

    def _note(self, bad: BadImage) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow((self.data, bad.name, bad.reason))
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.getvalue().encode(errors="surrogateescape"))  # one write: lines stay whole
        finally:
            os.close(handle)

    def check(self) -> None:
        """Look at the file if it has grown.

        Raises:
            UserError: more images are broken than may be.
        """
        size = self.file.stat().st_size if self.file.exists() else 0
        if size == self.seen_bytes:
            return
        self.seen_bytes = size
        rows = self.rows()
        if len(rows) > self.max_fraction * self.images:
            self.tidy()
            data, path, reason = rows[0]
            raise UserError(
                f"{len(rows)} of {self.images} training images of {data} are broken, such as {path} ({reason}); "
                f"data.max_bad_fraction={self.max_fraction:g} allows {int(self.max_fraction * self.images)}. "
                f"{self.file} lists them"
            )

    def rows(self) -> list[tuple[str, ...]]:
        """(data, path, reason) of each broken image of this set, sorted."""
        return [row for row in self._all_rows() if row[0] == self.data]

    def tidy(self) -> None:
        """Write the file anew: its columns, then each image once, sorted."""
        if not self.file.exists():
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *self._all_rows()])
        part = self.file.with_suffix(".part")
        part.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
        part.replace(self.file)

    def _all_rows(self) -> list[tuple[str, ...]]:
        if not self.file.exists():
            return []
        with self.file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            rows = {tuple(row[:2]): tuple(row) for row in csv.reader(lines) if len(row) == len(COLUMNS)}
        rows.pop(COLUMNS[:2], None)
        return sorted(rows.values())
