"""CIFAR-10 as JPEG files: its layouts are read alike, and the human labels of CIFAR-10N fit it."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_cases import accept_cifar10, make_cifar10
from PIL import Image

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import fingerprint, load, noise
from exnorm.data.sets.cifar10_jpeg import CLASSES

EACH = 3


def make_jpegs(root: Path, val: str = "test") -> Path:
    """The layout of the repository; the red of an image is ten times its class."""
    for split in ("train", val):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(EACH):
                image = Image.new("RGB", (32, 32), (10 * label, 20 * index, 0))
                image.save(root / split / name / f"{index:04}.jpg", quality=95)
    return root


def config(root: Path, *more: str):  # noqa: ANN201  # OmegaConf's
    """The configuration of the set."""
    return compose_train(["data=cifar10_jpeg", f"data.root={root}", *more]).data


def pack(root: Path, folders: Path) -> Path:
    """A tar file for each class, with <class>/<image>."""
    for split, target in (("train", "train"), ("test", "val")):
        (root / target).mkdir(parents=True)
        for folder in (folders / split).iterdir():
            with tarfile.open(root / target / f"{folder.name}.tar", "w") as tar:
                for file in sorted(folder.iterdir()):
                    tar.add(file, f"{folder.name}/{file.name}")
    return root


def test_three_layouts_are_the_same_images(tmp_path: Path) -> None:
    first = make_jpegs(tmp_path / "repository")
    layouts = [first, make_jpegs(tmp_path / "val", "val"), pack(tmp_path / "tars", first)]
    for root in layouts:
        splits = load(config(root))
        assert list(splits.classes) == CLASSES
        for images in (splits.train, splits.val):
            assert len(images) == 10 * EACH
            for index in range(len(images)):
                red, _, _ = np.asarray(images.open_image(index)).reshape(-1, 3).mean(0)
                assert red == pytest.approx(10 * images.labels[index], abs=3)


def test_asymmetric_noise_is_that_of_cifar10(tmp_path: Path) -> None:
    """A truck becomes an automobile; a frog stays."""
    splits = load(config(make_jpegs(tmp_path), "data.noise.kind=asymmetric", "data.noise.rate=1"))
    pairs = {(CLASSES[before], CLASSES[after]) for _, before, after in noise.wrong_labels(splits.train)}
    assert ("truck", "automobile") in pairs and "frog" not in {before for before, _ in pairs}


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("test", "has no folder test or val; expected DIR/train"),
        ("train", "has no folder train; expected DIR/train"),
        ("train/dog", "train has the classes airplane, automobile, bird, cat, deer, frog"),
    ],
)
def test_another_layout_gets_one_line(tmp_path: Path, broken: str, line: str) -> None:
    root = make_jpegs(tmp_path / "images")
    (root / broken).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=line):
        fingerprint(config(root))


def test_human_labels_of_cifar10n_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scripts/cifar10n.py` reads the published file without its pickles, and `data=cifar10` reads what it writes."""
    count = 5 * 40  # training images of the miniature
    clean = np.array([index % 10 for index in range(40)] * 5)
    worst = (clean + 1) % 10
    published = {"clean_label": clean, "aggre_label": clean, "worse_label": worst}
    published |= {f"random_label{number}": clean for number in (1, 2, 3)}
    torch.save(published, tmp_path / "CIFAR-10_human.pt")
    done = script(tmp_path / "CIFAR-10_human.pt", tmp_path / "labels")
    assert done.returncode == 0, done.stderr
    names = {file.stem for file in (tmp_path / "labels").iterdir()}
    assert names == {"aggregate", "random1", "random2", "random3", "worst"}
    assert "worst.csv: 100.0 % of 200 labels are wrong" in done.stdout
    root = make_cifar10(tmp_path / "cifar")
    accept_cifar10(root, monkeypatch)
    words = ["data=cifar10", f"data.root={root}", "data.noise.kind=file"]
    given = compose_train([*words, f"data.noise.file={tmp_path / 'labels' / 'worst.csv'}"]).data
    assert len(noise.wrong_labels(load(given).train)) == count


def test_human_labels_name_the_jpeg_files_by_their_place_in_the_class(tmp_path: Path) -> None:
    """CIFAR's order is mixed; the files of a class count its images in that order."""
    clean = np.random.default_rng(0).permutation(np.repeat(np.arange(10), EACH))
    other = np.arange(len(clean)) % 10
    published = {"clean_label": clean, "aggre_label": clean, "worse_label": other}
    torch.save(published | {f"random_label{n}": clean for n in (1, 2, 3)}, tmp_path / "CIFAR-10_human.pt")
    root = make_jpegs(tmp_path / "images")
    done = script(tmp_path / "CIFAR-10_human.pt", root / "human_labels", "--jpeg")
    assert done.returncode == 0, done.stderr
    for name, labels in (("aggregate", clean), ("worst", other)):
        given = config(root, "data.noise.kind=file", f"data.noise.file=human_labels/{name}.csv")
        train = load(given).train
        places = [int(np.flatnonzero(clean == index // EACH)[index % EACH]) for index in range(len(train))]
        assert list(train.labels) == [labels[place] for place in places]


@pytest.mark.parametrize("damage", ["empty", "tensor", "short", "eleven"])
def test_another_file_than_that_of_cifar10n_gets_one_line(tmp_path: Path, damage: str) -> None:
    names = ("clean_label", "aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")
    columns = {name: np.arange(20) % 10 for name in names}
    if damage == "short":
        columns["worse_label"] = columns["worse_label"][:5]
    if damage == "eleven":
        columns["worse_label"] = columns["worse_label"] + 1
    file = tmp_path / "CIFAR-10_human.pt"
    torch.save(torch.zeros(3) if damage == "tensor" else columns, file)
    if damage == "empty":
        file.write_bytes(b"")
    done = script(file, tmp_path / "labels", "--jpeg")
    assert done.returncode == 1 and "CIFAR-10_human.pt is not the file of CIFAR-10N" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "labels").exists()


class Evil:
    """What runs code where a pickle is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("evil code ran",)


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"clean_label": Evil()}, tmp_path / "CIFAR-10_human.pt")
    done = script(tmp_path / "CIFAR-10_human.pt", tmp_path / "labels")
    assert done.returncode == 1 and "evil" not in done.stdout
    assert "CIFAR-10_human.pt is not the file of CIFAR-10N" in done.stderr and "Traceback" not in done.stderr


def script(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/cifar10n.py`."""
    command = [sys.executable, str(ROOT / "scripts" / "cifar10n.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
