"""Segmentation end to end in real processes: trained on any devices, resumed after kills, evaluated and predicted."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CliRunner
from engine_cases import (
    WAIT_S,
    assert_same_run,
    checkpoints,
    last_state,
    metrics,
    only_run,
    start,
    train_here,
    wait_for,
)
from mask_cases import make_cityscapes
from PIL import Image, ImageOps
from test_distributed import ONE_STEP, assert_close

import exnorm
from exnorm.data import load
from exnorm.data.palette import colours, overlaid
from exnorm.data.sets import cityscapes
from exnorm.data.splits import MaskedImages
from exnorm.diagnostics.mask_sheet import GAP, LINE, TILE
from exnorm.diagnostics.predict import Predictor
from exnorm.norms import Norm
from exnorm.runs.folder import RunFolder

pytestmark = pytest.mark.slow
SCENES = ("data=glyph_scenes", "data.num_train=36", "data.num_val=8")


def scenes(*more: str) -> list[str]:
    """Arguments of a training of seconds on drawn scenes; `more` comes last and wins."""
    small = ("data.workers=0", "logger=off", "batch=2x4", "trainer.epochs=2", "ops.backend=eager", "norm=gn")
    return ["train", "task=segmentation", "model=resnet_mini", *SCENES, *small, *more]


def pixels_of(path: Path) -> np.ndarray:
    """The pixels of an image, whose file is closed."""
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of EN."""
    return train_here(scenes("norm=en"), tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize("norm", ["bn", "en"])
def test_the_loss_over_replicas_is_one_experiment_in_passes_and_on_devices(norm: str, tmp_path: Path) -> None:
    """Crops have different numbers of valid pixels, and with 4 devices two of them share a replica."""

    settings = scenes(f"norm={norm}", *ONE_STEP, "trainer.steps=1")
    once = train_here(settings, tmp_path / "once")
    others = [train_here([*settings, "trainer.passes=2"], tmp_path / "passes")]
    others += [train_here([*settings, f"trainer.devices={devices}"], tmp_path / f"on {devices}") for devices in (2, 4)]
    for other in others:
        assert_close(last_state(once)["model"], last_state(other)["model"])


def test_the_record_has_all_metrics_and_every_class(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert [metric["name"] for metric in record["metrics"]][:2] == ["miou", "pixel_accuracy"]
    each = {key: value for key, value in record.items() if key.startswith("val/iou/")}
    assert len(each) == 11 and record["val/undefined_classes"] == sum(value is None for value in each.values())
    defined = [value for value in each.values() if value is not None]
    assert record["val/miou"] == pytest.approx(np.mean(defined))
    assert record["best"]["val/miou"] == max(row["val/miou"] for row in metrics(finished) if "val/miou" in row)


def test_a_killed_run_goes_on_bit_equal(tmp_path: Path) -> None:
    settings = scenes("norm=en", "trainer.steps=16", "trainer.validate_every=5", "trainer.checkpoint_every_steps=2")
    whole = train_here(settings, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    process = start(settings, tmp_path / "cut")
    wait_for(lambda: [*(tmp_path / "cut").glob("runs/*/*/checkpoints/step-000000006.pt")], "a checkpoint")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=WAIT_S)
    run = only_run(tmp_path / "cut")
    assert not (run / "record.json").exists() and checkpoints(run)
    assert_same_run(whole, train_here(settings, tmp_path / "cut"))


def evaluations(run: Path) -> list[dict[str, Any]]:
    """All evaluations of a run."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_scales_flip_and_window_are_part_of_an_evaluation(finished: Path, cli_here: CliRunner) -> None:
    def evaluated(*settings: str) -> dict[str, Any]:
        assert cli_here("eval", finished, *settings).returncode == 0
        return evaluations(finished)[-1]

    record = json.loads((finished / "record.json").read_text())
    plain = evaluated()
    assert plain["val/miou"] == pytest.approx(record["val/miou"], rel=1e-6) and "test" not in plain
    others = [
        evaluated("test.scales=[0.75,1,1.25]"),
        evaluated("test.flip=true"),
        evaluated("test.window=64"),
        evaluated("test.window=64", "test.flip=true", "test.scales=[1,1.5]"),
    ]
    assert [row["test"] for row in others] == [
        "scales 0.75, 1, 1.25",
        "flip",
        "windows of 64 px",
        "scales 1, 1.5; flip; windows of 64 px",
    ]
    assert len({row["id"] for row in (plain, *others)}) == 5
    assert len({row["val/loss"] for row in (plain, *others)}) == 5
    assert evaluated("test.window=96")["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-4)


def test_two_processes_evaluate_as_one_does(finished: Path, cli_here: CliRunner) -> None:
    for devices in (1, 2):
        done = cli_here("eval", finished, f"devices={devices}")
        assert done.returncode == 0, done.stderr
    one, two = evaluations(finished)[-2:]
    assert {key: two[key] for key in one if key.startswith("val/iou")} == {
        key: one[key] for key in one if key.startswith("val/iou")
    }


def test_a_classification_run_gives_the_backbone(tmp_path: Path) -> None:
    """Norms, ratios and running statistics included. Different batch settings are worth a line."""
    classifier = ("train", "model=resnet_mini", "data=digits", "norm=en", "batch=2x8", "logger=off", "data.workers=0")
    source = train_here([*classifier, "trainer.steps=4", "ops.backend=eager"], tmp_path / "source")
    settings = scenes("norm=en", "trainer.steps=1", "optim.lr=1e-12", f"model.init_from={source}")
    process = start(settings, tmp_path)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert "comparable batch settings" in out and "start" in out
    run = only_run(tmp_path)
    before, after = last_state(source)["model"], last_state(run)["model"]
    shared = {f"backbone.{key}" for key in before if not key.startswith("fc.")}
    assert shared == {key for key in after if key.startswith("backbone.")}
    moved = [
        key for key in shared if not torch.allclose(after[key].float(), before[key[9:]].float(), rtol=1e-4, atol=1e-6)
    ]
    assert all("running" in key or "tracked" in key for key in moved)  # one batch of scenes is in the statistics
    statistics = exnorm.load(source).state_dict()
    assert any(key.endswith("running_mean") for key in statistics)


@pytest.mark.parametrize("norm", ["bn", "sn", "en"])
def test_statistics_can_cover_the_whole_batch(norm: str, tmp_path: Path) -> None:
    """SyncBN, SyncSN and SyncEN."""
    run = train_here(scenes(f"norm={norm}", "norm.sync=true", "trainer.steps=2"), tmp_path)
    assert json.loads((run / "record.json").read_text())["val/miou"] is not None


@pytest.mark.parametrize("head", ["fcn", "psp", "deeplabv3"])
def test_every_head_trains_with_all_of_its_norms_replaced(head: str, tmp_path: Path) -> None:
    more = ["norm=sn"] if head == "fcn" else ["norm=sn", "norm.sync=true"]
    run = train_here(scenes(f"model.head={head}", "trainer.steps=1", *more), tmp_path)
    model = exnorm.load(run)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, Norm) for module in model.head.modules()) >= 1


MISTAKES = {
    "task=segmentation data=digits": "task=segmentation needs masks, and data=digits has labels. Type "
    "task=classification, or choose a data set with masks: ",
    "data=glyph_scenes": "task=classification needs labels, and data=glyph_scenes has masks. Type task=segmentation,",
    "task=segmentation data=glyph_scenes model=resnet_mini model.head=unet": "head",
    "data=digits model.head=fcn": "model.head=fcn: task=classification has no such option",
    "task=segmentation data=glyph_scenes model=vit_tiny_patch16_224": "stride",
    "task=segmentation data=glyph_scenes data.noise.kind=symmetric data.noise.rate=0.2 model=resnet_mini": "label",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words: str, run_cli: CliRunner, tmp_path: Path) -> None:
    """And nothing is left behind."""
    result = run_cli("train", *words.split(), "logger=off", "data.workers=0", *SCENES[1:][: 2 * ("scenes" in words)])
    assert result.returncode == 2 and MISTAKES[words] in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert not [*tmp_path.glob("runs/*/*")]


def test_runs_that_cannot_be_compared_are_named(finished: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    digits = ("train", "model=resnet_mini", "data=digits", "norm=gn", "logger=off", "data.workers=0", "trainer.steps=1")
    classifier = train_here([*digits, "ops.backend=eager"], tmp_path / "digits")
    streets = train_here(scenes("data=glyph_streets", "trainer.steps=1"), tmp_path / "streets")
    mistakes = {
        (): "give the folders of one or more runs of task=segmentation",
        (str(classifier),): "is a run of task=classification, which has no masks to compare",
        (str(finished), str(streets)): f"{streets} has other classes than {finished}",
        (str(finished), "data=digits"): "task=segmentation needs masks, and data=digits has labels",
    }
    for runs, line in mistakes.items():
        result = cli_here("compare", *runs, "test.flip=false")
        assert result.returncode == 2 and line in result.stderr and not (tmp_path / "compared.png").exists()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("test.window=200", "test.window=200 is larger than an image of 96 x 96 px"),
        ("test.scales=[1,-1]", "give positive factors"),
        ("test.scales=[]", "give positive factors"),
        ("test.window=all", "give the side of a window in px, or test.window=whole"),
        ("data=digits", "task=segmentation needs masks, and data=digits has labels"),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_line(setting: str, line: str, finished: Path, cli_here: CliRunner) -> None:
    result = cli_here("eval", finished, setting)
    assert result.returncode == 2 and line in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_predictions_are_masks_of_the_size_of_the_image(finished: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    """Those of a folder keep its structure, and a broken image does not stop the others."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "deep" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    result = cli_here("predict", finished, "in", "test.flip=true")
    assert result.returncode == 1 and "b.jpg is not a readable image" in result.stderr
    folder = tmp_path / "predictions" / "deep"
    index, colour, overlay = (pixels_of(folder / f"a_{kind}.png") for kind in ("index", "colour", "overlay"))
    assert index.shape == colour.shape[:2] == overlay.shape[:2] == (50, 70)
    classes = np.unique(index)
    assert classes.max() < 11 and len(np.unique(colour.reshape(-1, 3), axis=0)) == len(classes)


def test_runs_are_compared_image_by_image(finished: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    """A row has the image, its mask and the prediction of each run, under their names."""
    result = cli_here("compare", finished, finished, "--images", "2", "data.num_val=3")
    assert (result.returncode, result.stdout) == (0, "figure: compared.png\n")
    sheet = pixels_of(tmp_path / "compared.png")
    predictor = Predictor(RunFolder(finished), ["data.num_val=3"])
    images = load(predictor.data, train=False).val
    assert isinstance(images, MaskedImages)
    for row, index in enumerate((0, 2)):
        image, mask = images.open(index)
        predicted = Image.fromarray(predictor.mask(image))
        painted = [overlaid(image, each, colours(11)) for each in (mask, predicted, predicted)]
        tiles = np.stack([np.asarray(ImageOps.contain(each, TILE)) for each in (image, *painted)])
        height, width = tiles.shape[1:3]
        found = sheet[LINE + row * (height + GAP) :][:height]
        for column, tile in enumerate(tiles):
            assert (found[:, column * (TILE[0] + GAP) :][:, :width] == tile).all(), (row, column)


def test_predictions_for_cityscapes_can_be_submitted(cli_here: CliRunner, tmp_path: Path) -> None:
    """The benchmark's server wants labelIds, in files whose names begin with those of the images."""
    root = make_cityscapes(tmp_path / "city")
    data = ["data=cityscapes", f"data.root={root}", "data.image_size=32", "data.resize=32", "data.num_train=null"]
    run = train_here(scenes(*data, "data.num_val=null", "batch=1x2", "trainer.steps=1"), tmp_path)
    assert cli_here("predict", run, root / "leftImg8bit" / "test").returncode == 0
    for frame in range(2):
        file = tmp_path / "predictions" / "berlin" / f"berlin_{frame:06}_000019_leftImg8bit_index.png"
        assert set(np.unique(pixels_of(file))) <= set(cityscapes.label_ids())


def test_predictions_of_a_classifier_are_a_table(cli_here: CliRunner, tmp_path: Path) -> None:
    arguments = ["train", "model=resnet_mini", "data=digits", "norm=gn", "logger=off", "data.workers=0"]
    run = train_here([*arguments, "trainer.steps=1", "ops.backend=eager"], tmp_path)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    for _ in range(2):  # the second time replaces the table
        assert cli_here("predict", run, "a.png", "--out", "out").returncode == 0
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,rank,class,probability" and len(lines) == 6
    shares = [float(line.rpartition(",")[2]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.000001


def test_explain_shows_ratios_and_the_classes_with_most_pixels(
    finished: Path, cli_here: CliRunner, tmp_path: Path
) -> None:
    Image.fromarray(np.full((60, 80, 3), 128, np.uint8)).save(tmp_path / "a.png")
    result = cli_here("explain", finished, "a.png")
    assert result.returncode == 0 and (tmp_path / "explained.png").is_file()
    assert result.stdout.startswith("a.png: ") and "%" in result.stdout
