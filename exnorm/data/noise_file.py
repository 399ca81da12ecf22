"""Training labels from a file (`data.noise.kind=file data.noise.file=FILE`), such as labels that people gave.

The file is a CSV with a header. It has the columns `path` and `label`, or `index` and `label`; others are ignored.
Each training image has one row. A path begins in the folder of the training images, or is that of a member of a tar
file. An index counts the training images from 0, in the order of the data set. A label is the name of a class, or its
number from 0 on.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exnorm.config.errors import UserError, suggest
from exnorm.data.paths import file_of, root_of
from exnorm.data.splits import Images

KEY = "data.noise.file"
MOST_DIGITS = 10  # of a class's number
PATH, INDEX, LABEL = "path", "index", "label"


def fingerprint(config: Any) -> str:
    """Return a hash of the file that `data.noise.file` names.

    Raises:
        UserError: there is no such file.
    """
    return hashlib.sha256(_file(config).read_bytes()).hexdigest()


def _file(config: Any) -> Path:
    """Return the file, which is in the current folder or in that of the data set."""
    name = config.noise.file
    here = Path(name).expanduser()
    if here.is_file():
        return here
    if config.root is None and not config.roots:
        raise UserError(f"{KEY}={name}: there is no such file in the current folder")
    try:
        return file_of(name, root_of(config, layout=""), KEY)
    except UserError:
        raise UserError(
            f"{KEY}={name}: there is no such file in the current folder or in that of {config.name}"
        ) from None


def labelled(images: Images, classes: Sequence[str], config: Any) -> Images:
    """Return training images with the labels of the file; their own ones become the clean labels.

    Args:
        config: of the data set.

    Raises:
        UserError: a row has an unknown path, index or class, an image has no row or two, or the file has another form.
    """
    file = _file(config)
    column, rows = _rows(file)
    if column == PATH and images.name_of is None:
        raise UserError(f"{KEY}={file} has paths, but {config.name} has no files. Give indices in a column '{INDEX}'")
    if column == INDEX and (images.name_of is not None or images.excluded):
        raise UserError(
            f"{KEY}={file} has indices, and the order of the images of {config.name} depends on its files. Give paths "
            f"in a column '{PATH}'"
        )
    names = [(images.name_of or str)(place) for place in range(len(images))]
    twice = len(names) - len(set(names))
    if twice:
        raise UserError(
            f"{KEY}={file}: {twice} training images have the name of another one in another tar file, so a path says "
            "too little. Put the images of each class into a folder of its own"
        )
    unknown = rows.keys() - set(names)
    if len(unknown) > images.excluded:
        raise UserError(f"{file}: no training image has the {column} {min(unknown)} ({len(unknown)} such rows)")
    lacking = [name for name in names if name not in rows]
    if lacking:
        raise UserError(
            f"{file} has no label for {len(lacking)} of {len(names)} training images, such as {column} {lacking[0]}"
        )
    numbers = _numbers({rows[name] for name in names}, classes, file)
    labels = np.array([numbers[rows[name]] for name in names], np.int32)
    return replace(images, labels=labels, clean_labels=np.asarray(images.labels, np.int32))


def _rows(file: Path) -> tuple[str, dict[str, str]]:
    """Return the column that names an image, and the label of each name."""
    found: dict[str, str] = {}
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        heads = reader.fieldnames or []
        columns = [name for name in (PATH, INDEX) if name in heads]
        if len(columns) != 1 or heads.count(LABEL) != 1:
            raise UserError(f"{file} begins with '{','.join(heads)}'; expected a header such as {PATH},{LABEL}")
        (column,) = columns
        try:
            for row in reader:
                name, label = row[column], row[LABEL]
                if not name or not label:
                    raise UserError(f"{file}, line {reader.line_num}: expected a {column} and a label")
                if name in found:
                    raise UserError(f"{file}, line {reader.line_num}: {column} {name} has a second row")
                found[name] = label
        except csv.Error as problem:
            raise UserError(f"{file}, line {reader.line_num}: {problem}") from None
    return column, found


def _numbers(labels: set[str], classes: Sequence[str], file: Path) -> Mapping[str, int]:
    """Return the number of the class that each label names."""
    places = {name: place for place, name in enumerate(classes)}
    if labels <= places.keys():
        return places
    numbers = all(label.isdecimal() and len(label) < MOST_DIGITS for label in labels)
    if numbers and not any(name.isdecimal() for name in classes):  # else a wrong name would turn names into numbers
        largest = max(labels, key=int)
        if int(largest) >= len(classes):
            raise UserError(f"{file}: label {largest}. There are {len(classes)} classes, from 0 to {len(classes) - 1}")
        return {label: int(label) for label in labels}
    odd = min(labels - places.keys())
    raise UserError(f"{file}: no class is called '{odd}': {suggest(odd, classes)}")
