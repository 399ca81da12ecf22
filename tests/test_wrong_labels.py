"""`exnorm ratios --wrong-labels`: the images that are compared, the AUC and its interval, and that it is held out."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CliRunner
from engine_cases import make_image_folder, tiny, train_here
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import load
from exnorm.data.splits import Images
from exnorm.data.transforms import eval_transform
from exnorm.diagnostics.wrong_labels import auc_of, chosen_images, held_out_scores, measure_wrong_labels
from exnorm.engine import checkpoint
from exnorm.report import label_auc
from exnorm.runs.folder import RunFolder

NOISE = ("data.noise.kind=symmetric_exclusive", "data.noise.rate=0.4")


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    draw = np.random.default_rng(0)
    wrong = draw.random(300) < 0.4
    score = draw.normal(size=300) + 0.7 * wrong
    area, low, high = auc_of(score, wrong)
    assert area == pytest.approx((score[wrong][:, None] > score[~wrong]).mean())
    assert low < area < high


def test_the_interval_covers_the_true_auc() -> None:
    """In about 95 of 100 repetitions: two normal distributions that are one deviation apart."""
    draw, true, covered = np.random.default_rng(1), 0.7602, 0
    wrong = np.arange(200) < 100
    for _ in range(400):
        _, low, high = auc_of(draw.normal(size=200) + wrong, wrong)
        covered += low < true < high
    assert 0.92 < covered / 400 < 0.98


def test_ratios_that_say_nothing_get_half_although_a_fit_would_explain_them() -> None:
    draw = np.random.default_rng(2)
    wrong = np.arange(400) % 2 == 0
    area, *_ = auc_of(held_out_scores(draw.dirichlet([1] * 60, size=400), wrong), wrong)
    assert area == pytest.approx(0.5, abs=0.09)
    told = draw.dirichlet([3, 2, 1], size=400) + 0.3 * wrong[:, None] * np.array([1, -1, 0])
    assert auc_of(held_out_scores(told, wrong), wrong)[0] > 0.8


def test_each_class_has_as_many_wrong_as_correct_labels() -> None:
    """So that knowing the class is no help: here class 0 is nearly always wrong and class 1 nearly never."""
    clean = np.repeat([0, 1, 2], 400)
    labels = clean.copy()
    labels[:380] = 1
    labels[400:410] = 2
    images = Images(labels, lambda index: Image.new("RGB", (1, 1)), clean_labels=clean)
    indices = chosen_images(images)
    assert len(set(indices.tolist())) == len(indices)
    wrong = labels != clean
    for label, count in ((0, 20), (1, 10), (2, 0)):
        chosen = indices[clean[indices] == label]
        assert (wrong[chosen].sum(), (~wrong[chosen]).sum()) == (count, count)
    with pytest.raises(UserError, match="found 0 wrong labels"):
        chosen_images(Images(clean, images.open_image, clean_labels=clean))


@pytest.mark.slow
def test_the_command_measures_once_and_refuses_in_one_line(tmp_path: Path, cli_here: CliRunner) -> None:
    data = make_image_folder(tmp_path / "data")
    run = train_here(tiny(data, "norm=en", *NOISE), tmp_path)
    done = cli_here("ratios", run, "--wrong-labels")
    assert done.returncode == 0, done.stderr
    assert "where 0.5 is chance" in done.stdout and (run / "figures" / "wrong_labels.svg").is_file()
    (file,) = run.glob("label_ratios-*.csv")
    frame = measure_wrong_labels(RunFolder(run))
    assert list(frame.layer)[-2:] == ["all layers", "loss"] and len(frame) > 4
    assert frame.loc[0, "images"] % 2 == 0 and ((frame.low >= 0) & (frame.low <= frame.auc)).all()

    config = checkpoint.read_config(RunFolder(run))
    images = load(config.data).train
    model = checkpoint.build_trained(config, checkpoint.find(RunFolder(run), "last")).eval()
    transform, losses, wrong = eval_transform(config.data), [], []
    for index in chosen_images(images):
        pixels, label, clean = transform(*images.open(int(index)))
        logits = model(transform.normalize(pixels[None])).detach()
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
        wrong.append(label != clean)
    assert auc_of(np.array(losses), np.array(wrong))[0] == pytest.approx(frame.auc.iloc[-1], abs=1e-3)

    record = run / "record.json"
    before = record.read_text()
    record.write_text(before.replace('"sha256": "', '"sha256": "0'))
    kept = file.rename(tmp_path / "kept.csv")
    with pytest.raises(UserError, match="the labels of the data set are not those that the run was trained with"):
        measure_wrong_labels(RunFolder(run))
    record.write_text(before)
    kept.rename(file)

    file.write_text("layer,auc\n")
    done = cli_here("ratios", run, "--wrong-labels")
    assert done.returncode == 2 and f"{file} is damaged. Remove it" in done.stderr
    shutil.rmtree(run)
    clean_run = train_here(tiny(data, "norm=en", "trainer.epochs=1"), tmp_path)
    plain = train_here(tiny(data, "norm=sn", "trainer.epochs=1", *NOISE), tmp_path)
    for folder, words, line in (
        (clean_run, [], "--wrong-labels needs a run with wrong labels"),
        (plain, [], "only norm=en has them"),
        (plain, ["--by-class"], "Leave the other options out"),
    ):
        done = cli_here("ratios", folder, "--wrong-labels", *words)
        assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_sentence_names_the_best_layer_and_the_loss() -> None:
    rows = [("a", 40, 0.52, 0.4, 0.6), ("b", 40, 0.7, 0.6, 0.8), ("loss", 40, 0.9, 0.8, 0.95)]
    frame = pd.DataFrame(rows, columns=["layer", "images", "auc", "low", "high"])
    said = label_auc.sentence(frame)
    assert "0.52 to 0.70 (b)" in said and "above 0.5 in 1 of 2 rows" in said and "label is 0.90" in said
    assert len(label_auc.draw(frame, "t").axes) == 1
