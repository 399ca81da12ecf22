"""`results/records/<study>.csv`: what a study has measured, one row for each cell, seed and metric.

A file is replaced whole, under a lock, so that several processes can add to it and a kill leaves the old one.
"""

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exnorm.runs.folder import write_text_atomic

COLUMNS = (
    "scale",
    "cell",  # the values of the study's axes: norm=sn batch=8x2
    "seed",
    "metric",
    "value",
    "facts",  # of the run that a reader of the number has to know: inference=batch_average drop_rate=0.5
    "hours",  # of training
    "device",
    "torch",
    "commit",
    "uncommitted",  # whether the code had changes that are not in the commit
    "config_hash",
    "run",
)

Row = dict[str, str]


def record_file(results: Path, study: str) -> Path:
    """The file of a study's records."""
    return results / "records" / f"{study}.csv"


def read_records(results: Path, study: str) -> list[Row]:
    """The rows of a study; none where nothing was measured.

    Raises:
        ValueError: a file with other columns.
    """
    path = record_file(results, study)
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except FileNotFoundError:
        return []
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}: move it away and collect it again")
    return rows


def change_records(results: Path, study: str, change: Callable[[list[Row]], list[Row]]) -> None:
    """Replace a study's rows by what `change` makes of them; other processes that do so wait."""
    path = record_file(results, study)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in change(read_records(results, study)))
        write_text_atomic(path, stream.getvalue())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
