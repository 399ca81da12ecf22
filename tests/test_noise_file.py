"""Labels from a file: which file is taken, what it may hold, and what is said of one that does not fit."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CliRunner
from data_cases import make_class_tars
from engine_cases import CLASSES, make_image_folder, metrics, tiny, train_here
from omegaconf import OmegaConf

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import fingerprint, load, noise
from exnorm.engine.launch import identity

EACH = 4  # training images per class


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of three classes."""
    return make_image_folder(tmp_path / "images", train=EACH, val=1)


def config(root: Path, file: Path | str, **values: Any) -> Any:
    """The configuration of the folder with labels from a file."""
    own = compose_train(["data=imagefolder", f"data.root={root}", "data.noise.kind=file", f"data.noise.file={file}"])
    return OmegaConf.merge(own.data, values)


def paths(root: Path) -> list[str]:
    """The training images, in the order of the data set."""
    return sorted(path.relative_to(root / "train").as_posix() for path in (root / "train").rglob("*.*"))


def shifted(name: str) -> str:
    """Another class than that of an image."""
    return CLASSES[(CLASSES.index(name.split("/")[0]) + 1) % len(CLASSES)]


def written(file: Path, rows: list[tuple[Any, Any]], head: str = "path,label") -> Path:
    """A file of labels."""
    file.write_text("\n".join([head, *(f"{name},{label}" for name, label in rows)]) + "\n")
    return file


def rows_of(root: Path) -> list[tuple[Any, Any]]:
    """Paths and labels, of which the first image's is wrong."""
    first, *others = paths(root)
    return [(first, shifted(first)), *((name, name.split("/")[0]) for name in others)]


def test_labels_are_those_of_the_file_and_the_own_ones_stay_as_clean_labels(root: Path, tmp_path: Path) -> None:
    """By names or numbers of classes, in any order of the rows."""
    named = rows_of(root)
    numbered = [(name, CLASSES.index(label)) for name, label in named]
    for rows in (named[::-1], numbered[::-1]):
        splits = load(config(root, written(tmp_path / "labels.csv", rows)))
        assert list(splits.train.labels) == [label for _, label in numbered]
        assert list(splits.train.clean_labels) == [CLASSES.index(name.split("/")[0]) for name, _ in named]
        assert noise.wrong_labels(splits.train) == [(0, 0, 1)]
        assert splits.val.clean_labels is None


def test_images_without_files_have_indices(tmp_path: Path) -> None:
    own = load(compose_train(["data=digits"]).data).train
    rows = [(place, (int(label) + (place == 5)) % 10) for place, label in enumerate(own.labels)]
    file = written(tmp_path / "labels.csv", rows[::-1], "index,label")
    words = ["data=digits", "data.noise.kind=file", f"data.noise.file={file}"]
    assert [place for place, *_ in noise.wrong_labels(load(compose_train(words).data).train)] == [5]


def test_members_of_one_name_in_two_tar_files_are_refused(root: Path, tmp_path: Path) -> None:
    """A row would label an image of each class."""
    (tmp_path / "tars" / "train").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "tars" / split).mkdir(exist_ok=True)
        for folder in (root / split).iterdir():
            with tarfile.open(tmp_path / "tars" / split / f"{folder.name}.tar", "w") as tar:
                for image in sorted(folder.iterdir()):
                    tar.add(image, image.name)
    file = written(tmp_path / "labels.csv", [(f"{n}.{'png' if n % 2 else 'jpg'}", "cat") for n in range(EACH)])
    with pytest.raises(UserError, match="8 training images have the name of another one in another tar file"):
        load(config(tmp_path / "tars", file, source="tar"))


def test_a_wrong_name_does_not_turn_names_of_classes_into_numbers(tmp_path: Path) -> None:
    """The classes are called 1, 2 and 3."""
    root = make_image_folder(tmp_path / "images", train=EACH, val=1)
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES, 1):
            (root / split / name).rename(root / split / str(number))
    names = paths(root)
    right = load(config(root, written(tmp_path / "labels.csv", [(name, name[0]) for name in names])))
    assert not noise.wrong_labels(right.train)
    wrong = [(name, name[0] if name[0] != "3" else "0") for name in names]
    with pytest.raises(UserError, match="no class is called '0'"):
        load(config(root, written(tmp_path / "labels.csv", wrong)))


def test_a_path_in_a_tar_file_begins_inside_of_it(root: Path, tmp_path: Path) -> None:
    """One file of labels serves a folder and its tar files."""
    file = written(tmp_path / "labels.csv", rows_of(root))
    expected = np.asarray(load(config(root, file)).train.labels)
    packed = make_class_tars(tmp_path / "tars", root)
    assert np.array_equal(load(config(packed, file, source="tar")).train.labels, expected)


def test_a_file_is_also_found_in_the_folder_of_the_data_set(root: Path, tmp_path: Path) -> None:
    written(root / "people.csv", rows_of(root))
    assert len(noise.wrong_labels(load(config(root, "people.csv")).train)) == 1


def test_the_hash_of_a_run_has_the_labels_and_not_the_name_of_their_file(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root)

    def hashed(file: Path) -> str:
        words = tiny(root, "data.noise.kind=file", f"data.noise.file={file}")[1:]
        composed = compose_train(words)
        return identity(composed, OmegaConf.to_container(composed, resolve=True))

    first = hashed(written(tmp_path / "a.csv", rows))
    assert hashed(written(tmp_path / "b.csv", rows)) == first
    assert hashed(written(tmp_path / "a.csv", [(name, "cat") for name, _ in rows])) != first


def test_excluded_images_need_no_row_and_may_have_one(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root)
    excluded = tmp_path / "excluded.txt"
    excluded.write_text(f"train/{rows[0][0]}\n")
    for given in (rows, rows[1:]):
        file = written(tmp_path / "labels.csv", given)
        splits = load(config(root, file, exclude=str(excluded)))
        assert len(splits.train) == 3 * EACH - 1 and not noise.wrong_labels(splits.train)


Change = Callable[[list[tuple[Any, Any]]], list[tuple[Any, Any]]]


@pytest.mark.parametrize(
    ("change", "head", "line"),
    [
        (lambda rows: rows[1:], "path,label", r"has no label for 1 of 12 training images, such as path \w+/0.jpg"),
        (
            lambda rows: [*rows, ("zoo/0.jpg", "cat")],
            "path,label",
            r"no training image has the path zoo/0.jpg \(1 such",
        ),
        (lambda rows: [*rows, rows[0]], "path,label", r"line 14: path \w+/0.jpg has a second row"),
        (lambda rows: [(rows[0][0], "cta"), *rows[1:]], "path,label", "no class is called 'cta': did you mean 'cat'"),
        (lambda rows: [(name, 3) for name, _ in rows], "path,label", "label 3. There are 3 classes, from 0 to 2"),
        (lambda rows: [(name, "") for name, _ in rows], "path,label", "line 2: expected a path and a label"),
        (lambda rows: rows, "file,class", "begins with 'file,class'; expected a header such as path,label"),
        (lambda rows: rows, "index,label", "has indices, and the order of the images of imagefolder depends on its"),
        (lambda rows: [(rows[0][0], "9" * 5000), *rows[1:]], "path,label", "no class is called '99"),
        (lambda rows: [(rows[0][0], "x" * 200_000), *rows[1:]], "path,label", "line 1: field larger than field limit"),
        (lambda rows: rows, "path,label,label", "begins with 'path,label,label'; expected a header"),
    ],
)
def test_a_file_that_does_not_fit_gets_one_line(
    root: Path, tmp_path: Path, change: Change, head: str, line: str
) -> None:
    file = written(tmp_path / "labels.csv", change(rows_of(root)), head)
    with pytest.raises(UserError, match=line):
        load(config(root, file))


def test_what_cannot_be_is_refused_before_the_images_are_read(root: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "labels.csv", rows_of(root))
    for wanted, line in (
        (config(root, tmp_path / "none.csv"), "none.csv: there is no such file in the current folder or in that of"),
        (config(root, file, noise={"rate": 0.2}), "the file says which labels are wrong"),
        (config(root, file, noise={"kind": "symmetric", "rate": 0.2}), "give both, as in data.noise.kind=file"),
    ):
        with pytest.raises(UserError, match=line):
            fingerprint(wanted)
    digits = compose_train(["data=digits", "data.noise.kind=file", f"data.noise.file={file}"]).data
    with pytest.raises(UserError, match="has paths, but digits has no files"):
        load(digits)


def test_a_run_records_the_labels_and_the_share_of_wrong_ones_that_it_fits(root: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "labels.csv", rows_of(root))
    run = train_here(tiny(root, "data.noise.kind=file", f"data.noise.file={file}"), tmp_path)
    recorded = json.loads((run / "record.json").read_text())["noise"]
    assert (recorded["kind"], recorded["wrong_labels"], recorded["images"]) == ("file", 1, 3 * EACH)
    assert "rate" not in recorded and "seed" not in recorded
    assert any("train/noisy_fitted" in row for row in metrics(run))


def test_doctor_counts_the_wrong_labels(root: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    file = written(tmp_path / "labels.csv", rows_of(root))
    done = cli_here("doctor", *config_words(root, file))
    assert "label noise: file, 1 of 12 training labels are wrong" in done.stdout, done.stderr


def config_words(root: Path, file: Path) -> list[str]:
    """The data set as one types it."""
    return ["data=imagefolder", f"data.root={root}", "data.noise.kind=file", f"data.noise.file={file}"]
