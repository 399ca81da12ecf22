"""`results/records/`: the measurements of studies, in up to five files each. They can be rebuilt from run folders.

    <study>.csv          a row for each cell, seed and metric, with its provenance
    <study>.epochs.csv   a row for each epoch: the learning curves
    <study>.layers.csv   ratios of layers, some cells, first seed: of all after the last epoch, of three after each
    <study>.classes.csv  ratios by class, first seed: of all layers after the last epoch, of three at the snapshots
    <study>.labels.csv   how well the ratios of each layer tell wrong labels, first seed

The files of a study are replaced under a lock, each in one step, so that several processes can add to them.
`<study>.csv` is replaced last. After a kill, the next collection of the runs completes the files.
"""

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from exnorm.config.errors import UserError
from exnorm.runs.folder import write_text_atomic
from exnorm.runs.lock import alone
from exnorm.runs.sinks import csv_text

KEY = (
    "scale",
    "cell",  # the values of the study's axes: norm=sn batch=8x2
    "seed",
)
PRIMARY, TRAIN = "primary", "train_primary"  # a task's primary metric in validation and in training
COLUMNS = {
    "runs": (
        *KEY,
        "metric",
        "value",
        "facts",  # settings that a reader of the number must know: inference=batch_average drop_rate=0.5
        "hours",  # of training
        "device",
        "torch",
        "commit",
        "uncommitted",  # whether the code had changes that are not in the commit
        "config_hash",
        "run",
    ),
    "epochs": (*KEY, "epoch", TRAIN, PRIMARY, "loss"),  # in the file, the name of the metric, such as top1
    "layers": (*KEY, "epoch", "layer", "kind", "normalizer", "mean", "std"),
    "classes": (*KEY, "epoch", "layer", "class", "normalizer", "images", "mean", "std"),
    "labels": (*KEY, "layer", "images", "auc", "low", "high"),
}

METRICS = (  # besides the task's; ratio/bn: mean share of a normalizer over layers; ratio_kl/large: % of SN's layers
    "updates",
    "images_per_s",
    "parameters_m",
    "gflops",
    "ratio/in",
    "ratio/ln",
    "ratio/bn",
    "ratio_kl/large",
)
DIVERGED_AT = "diverged_at"  # the step at which the loss was not finite: the only metric of a run that diverged

NUMBERS = ("value", "hours", "epoch", TRAIN, PRIMARY, "loss", "images", "mean", "std", "auc", "low", "high")
MEND = "repair it, or move it away and type exnorm reproduce, which collects it again from the run folders"

Row = dict[str, str]
Key = tuple[str, ...]  # the scale, cell and seed of a result
Rows = Mapping[str, list[Row]]  # of a study, by the kind of its files: runs, epochs, layers, classes, labels


def record_file(results: Path, study: str, kind: str = "runs") -> Path:
    """Return the file of a study's records of one kind."""
    return results / "records" / (f"{study}.csv" if kind == "runs" else f"{study}.{kind}.csv")


def recorded(results: Path) -> list[str]:
    """Return the studies that have a record."""
    files = (results / "records").glob("*.csv")
    return sorted(file.stem for file in files if not file.stem.endswith(tuple(f".{kind}" for kind in COLUMNS)))


def read_records(results: Path, study: str, kind: str = "runs") -> list[Row]:
    """Return the rows of a study; none if nothing was measured.

    Raises:
        UserError: the file is damaged.
    """
    path = record_file(results, study, kind)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: {MEND}") from None
    header, *lines = text.splitlines() or [""]
    names, columns = header.split(","), COLUMNS[kind]
    primary = names[columns.index(PRIMARY)] if PRIMARY in columns and len(names) == len(columns) else PRIMARY
    if tuple(names) != columns_of(kind, primary):
        raise UserError(f"{path} has other columns than {', '.join(columns_of(kind, primary))}: {MEND}")
    rows = list(csv.DictReader(lines, columns))
    for number, row in enumerate(rows, 2):
        if not _is_whole(row):
            raise UserError(f"{path}, line {number} is damaged: {MEND}")
    return rows


def key_of(row: Row) -> Key:
    """Return the scale, cell and seed of a row."""
    return tuple(row[name] for name in KEY)


def columns_of(kind: str, primary: str) -> tuple[str, ...]:
    """Return the columns of a file, with the name of the primary metric."""
    names = {PRIMARY: primary, TRAIN: f"train_{primary}"}
    return tuple(names.get(column) or column for column in COLUMNS[kind])


def _is_whole(row: Mapping[str | None, object]) -> bool:
    """Return whether a row has all columns, with numbers in the columns of numbers."""
    texts = {name: text for name, text in row.items() if isinstance(name, str) and isinstance(text, str)}
    if len(texts) < len(row) or not texts["seed"].isdecimal():
        return False
    try:
        return all(math.isfinite(float(texts[name] or 0)) for name in NUMBERS if name in texts)
    except ValueError:
        return False


def change_records(results: Path, study: str, change: Callable[[Rows], Rows], *, primary: str = PRIMARY) -> None:
    """Replace a study's rows by the result of `change`; other processes that do the same wait.

    Args:
        primary: the name of the primary metric of the study's task.
    """
    folder = results / "records"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".lock"):  # NFS can lock files but not folders
        rows = change({kind: read_records(results, study, kind) for kind in COLUMNS})
        for kind, columns in reversed(COLUMNS.items()):
            path = record_file(results, study, kind)
            if rows[kind] or kind == "runs":
                lines = [columns_of(kind, primary), *([row[name] for name in columns] for row in rows[kind])]
                write_text_atomic(path, csv_text(lines))
            else:
                path.unlink(missing_ok=True)
