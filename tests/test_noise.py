"""Label noise: the conventions' rates and classes, the same labels for the same seed, and clean labels kept."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CliRunner
from engine_cases import classification, metrics, train_here
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import noise
from exnorm.data.splits import Images, Splits

CLASSES = 8
COUNT = 8000
LABELS = [index % CLASSES for index in range(COUNT)]
DRAWN = [kind for kind in noise.KINDS if kind not in ("none", noise.FILE)]


def splits(mistaken_for: list[int] | None = None) -> Splits:
    """Clean sets of blank images."""
    images = Images(LABELS, lambda index: Image.new("RGB", (1, 1)))
    return Splits(images, images, [str(label) for label in range(CLASSES)], mistaken_for)


def config(kind: str, rate: float, seed: int = 0) -> Any:
    """The configuration of noise."""
    return SimpleNamespace(kind=kind, rate=rate, seed=seed, file=None)


def noisy_splits(kind: str, rate: float, mistaken_for: list[int] | None = None, seed: int = 0) -> Splits:
    """The sets with noise in the training labels."""
    return noise.with_noise(splits(mistaken_for), SimpleNamespace(noise=config(kind, rate, seed)))


def changed(kind: str, rate: float, mistaken_for: list[int] | None = None, seed: int = 0) -> list[tuple[int, int, int]]:
    """(index, clean, noisy) of the labels that noise changed."""
    return noise.wrong_labels(noisy_splits(kind, rate, mistaken_for, seed).train)


def test_symmetric_noise_draws_from_all_classes() -> None:
    """int(rate N) labels are touched, 1 - 1/C of them become wrong, into every other class alike."""
    wrong = changed("symmetric", 0.5)
    assert len(wrong) / (0.5 * COUNT) == pytest.approx(1 - 1 / CLASSES, abs=0.02)
    pairs = Counter((before, after) for _, before, after in wrong)
    assert len(pairs) == CLASSES * (CLASSES - 1) and max(pairs.values()) < 2 * min(pairs.values())


def test_exclusive_noise_makes_exactly_the_rate_wrong() -> None:
    wrong = changed("symmetric_exclusive", 0.3)
    assert len(wrong) == 0.3 * COUNT
    assert len({(before, after) for _, before, after in wrong}) == CLASSES * (CLASSES - 1)


def test_asymmetric_noise_takes_the_class_that_is_named_or_the_next() -> None:
    """A class that is mapped to itself keeps its labels."""
    assert all(after == (before + 1) % CLASSES for _, before, after in changed("asymmetric", 0.4))
    assert len(changed("asymmetric", 0.4)) == 0.4 * COUNT
    named = [3, 1, 0, 2, 4, 5, 6, 6]
    wrong = changed("asymmetric", 1.0, named)
    assert {(before, after) for _, before, after in wrong} == {(0, 3), (2, 0), (3, 2), (7, 6)}


@pytest.mark.parametrize("kind", DRAWN)
def test_labels_depend_on_the_seed_alone(kind: str) -> None:
    """Twice the same, and others for another seed; the clean labels stay, validation stays clean."""
    assert changed(kind, 0.2) == changed(kind, 0.2) != changed(kind, 0.2, seed=1)
    noisy = noisy_splits(kind, 0.2)
    assert noisy.train.clean_labels is not None and list(noisy.train.clean_labels) == LABELS
    assert noisy.val.labels == LABELS and noisy.val.clean_labels is None
    assert noise.facts(config(kind, 0.2), noisy.train)["wrong_labels"] == len(changed(kind, 0.2))


def test_the_labels_are_the_same_on_every_machine() -> None:
    """Hashes as they are written into records."""
    hashes = {kind: noise.facts(config(kind, 0.2), noisy_splits(kind, 0.2).train)["sha256"][:16] for kind in DRAWN}
    assert hashes == {
        "symmetric": "83f73e5bdff71de8",
        "symmetric_exclusive": "a16213981d97170e",
        "asymmetric": "24ea8873c7dca24b",
    }


@pytest.mark.parametrize(
    ("kind", "rate", "line"),
    [
        ("symetric", 0.2, "data.noise.kind=symetric: did you mean 'symmetric'"),
        ("symmetric", 1.5, "data.noise.rate=1.5: a share of the labels, from 0 to 1"),
        ("file", 0.0, "data.noise.kind=file with data.noise.file=null: give both"),
        ("none", 0.2, "data.noise.kind=none with data.noise.rate=0.2 adds no noise; give both"),
        ("symmetric", 0.0, "data.noise.kind=symmetric with data.noise.rate=0.0 adds no noise; give both"),
    ],
)
def test_noise_that_cannot_be_gets_one_line(kind: str, rate: float, line: str) -> None:
    with pytest.raises(UserError, match=line):
        noise.check(config(kind, rate))


def test_the_share_of_fitted_and_recovered_labels() -> None:
    """Of four wrong labels one is predicted, and for two the clean one; a right one counts for neither."""
    predicted = torch.tensor([1, 0, 0, 2, 3])
    labels = torch.tensor([1, 1, 2, 0, 3])
    clean = torch.tensor([0, 0, 0, 1, 3])
    task = classification(classes=4)
    logits = torch.nn.functional.one_hot(predicted, 4) * 9.0
    metrics = task.summarize(task.sums(logits, [labels, clean]))
    assert (metrics["noisy_fitted"], metrics["noisy_recovered"]) == (25.0, 50.0)
    assert metrics["top1"] == 40.0
    assert "noisy_fitted" not in task.summarize(task.sums(logits, [labels, labels]))


def test_a_run_keeps_the_wrong_labels_and_is_tested_on_the_other_set(tmp_path: Path, cli_here: CliRunner) -> None:
    """The file and its hash in the record, the fitted share in every epoch; glyphs_web's model evaluated on glyphs.

    The training images of glyphs do not matter there: batch averages are those of glyphs_web's.
    """
    sizes = ["data.num_train=40", "data.num_val=20", "data.image_size=32"]
    changes = ["model=resnet18", "model.name=test_resnet", "logger=off", "trainer.epochs=2", "batch=1x8", *sizes]
    folder = train_here(["train", "data=glyphs_web", "ops.backend=eager", *changes], tmp_path)
    record = json.loads((folder / "record.json").read_text())
    text = (folder / "noisy_labels.csv").read_text()
    assert record["noise"] == {
        **{"kind": "asymmetric", "rate": 0.2, "seed": 0, "wrong_labels": 8, "images": 40},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    assert len(text.splitlines()) == 9
    rows = [row for row in metrics(folder) if "val/top1" in row]
    assert len(rows) == 2 and all(0 <= row["train/noisy_fitted"] <= 100 for row in rows)
    assert not any(key.startswith("val/noisy") for row in rows for key in row)
    done = cli_here("eval", folder, "data=glyphs", *sizes)
    assert done.returncode == 0, done.stderr
    averages = ["inference=batch_average", "calibration_batches=5"]
    for training in ("data.num_train=40", "data.num_train=80"):
        done = cli_here("eval", folder, "data=glyphs", *sizes, training, *averages)
        assert done.returncode == 0, done.stderr
    moving, *averaged = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert moving["data"] == "glyphs" and moving["images"] == 20
    assert averaged[0]["id"] != averaged[1]["id"] and averaged[0]["val/loss"] == averaged[1]["val/loss"]
    assert averaged[0]["val/loss"] != moving["val/loss"]
