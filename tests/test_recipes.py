"""Recipes of today beside the papers' protocol: averaged weights, mixing, augmentation, clipping, warm-up in steps."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CliRunner
from engine_cases import (
    assert_same_run,
    checkpoints,
    classification,
    last_state,
    make_image_folder,
    metrics,
    tiny,
    train_here,
)
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import exnorm
from exnorm.config.groups import option_values
from exnorm.config.schema import DataConfig, OptimConfig
from exnorm.data.augment import policy
from exnorm.data.transforms import train_transform
from exnorm.engine import checkpoint
from exnorm.optim import learning_rate
from exnorm.tasks import Task, make_task

torch.set_num_threads(1)
RECIPES = {
    "ema": ["trainer.ema=0.9", "norm=ssn"],
    "clip": ["optim.clip_norm=0.5", "optim.warmup_steps=4", "optim=cosine"],
    "mix": ["task.mixup=0.2", "task.cutmix=1", "task.loss=bce", "task.label_smoothing=0.1"],
    "augment": ["data.auto_augment=rand-m9-mstd0.5-inc1", "data.random_erasing=0.5"],
    "augmix": ["data.auto_augment=augmix-m3-w3", "data.padding=4"],
    "lamb": ["optim=adamw", "optim.name=lamb", "+model.options.drop_path_rate=0.2"],
    "all": [
        *("trainer.ema=0.99", "optim.clip_norm=1", "task.mixup=0.5", "data.random_erasing=1"),
        *("data.auto_augment=original", "+model.options.drop_path_rate=0.2", "trainer.inference=batch_average"),
    ],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_resumes_bit_equal_with_a_recipe(recipe: str, images: Path, tmp_path: Path) -> None:
    """The last checkpoint is lost; the one inside the last epoch leads to the same end."""
    arguments = tiny(images, *RECIPES[recipe], "trainer.checkpoint_every_steps=5", "trainer.calibration_batches=2")
    whole = train_here(arguments, tmp_path / "whole")
    shutil.copytree(whole, cut := tmp_path / "cut" / whole.relative_to(tmp_path / "whole"))
    (cut / "record.json").unlink()
    before, last = checkpoints(cut)
    last.unlink()
    assert torch.load(before, weights_only=True)["step"] == 10
    assert train_here(arguments, tmp_path / "cut") == cut
    assert_same_run(whole, cut)
    plain = train_here(tiny(images), tmp_path / "plain")
    assert plain.name != whole.name and metrics(plain) != metrics(whole), "the recipe changes nothing"


def test_averaged_weights_are_validated_saved_and_loaded(images: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    """Step t: ema = d ema + (1 - d) weights, d = min(decay, 1 - t^(-2/3)); buffers, too."""
    run = train_here(tiny(images, "trainer.ema=0.9", "trainer.checkpoint_every_steps=1"), tmp_path)
    before, after = (torch.load(file, weights_only=True) for file in checkpoints(run))
    decay = min(0.9, 1 - after["step"] ** (-2 / 3))
    assert after["step"] - before["step"] == 1
    for name, value in after["ema"].items():
        expected = after["model"][name]
        if value.is_floating_point():
            expected = decay * before["ema"][name] + (1 - decay) * expected
        torch.testing.assert_close(value, expected, msg=name)
    loaded = exnorm.load(run)
    assert all(torch.equal(value, after["ema"][name]) for name, value in loaded.state_dict().items())
    done = cli_here("eval", run)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((run / "evaluations.jsonl").read_text())
    record = json.loads((run / "record.json").read_text())
    assert evaluated["val/loss"] == pytest.approx(record["val/loss"], rel=1e-6)
    frozen = ["optim.lr=0", "optim.weight_decay=0", "trainer.epochs=1", f"model.init_from={run}"]
    later = train_here(tiny(images, *frozen), tmp_path)
    assert torch.equal(last_state(later)["model"]["conv1.0.weight"], after["ema"]["conv1.0.weight"])
    for source in (run, checkpoints(run)[-1]):
        assert torch.equal(checkpoint.read_weights(source)["conv1.0.weight"], after["ema"]["conv1.0.weight"])


def test_clipped_gradients_bound_each_step(images: Path, tmp_path: Path) -> None:
    """Plain SGD of rate 1 moves all weights together by at most the norm."""
    plain = ["optim.lr=1", "optim.momentum=0", "optim.weight_decay=0", "optim.milestones=[]", "trainer.steps=1"]
    runs = [train_here(tiny(images, *plain, *more), tmp_path) for more in (["optim.lr=0"], ["optim.clip_norm=0.01"])]
    start, moved = (last_state(run)["model"] for run in runs)
    steps = [moved[name] - start[name] for name in start if name.endswith(("weight", "bias"))]
    assert float(torch.cat([step.flatten() for step in steps]).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mixing_does_not_depend_on_passes_and_devices(devices: int, images: Path, tmp_path: Path) -> None:
    """Images are mixed within their replica, with random numbers of the replica."""
    arguments = tiny(images, "batch=2x4", "task.mixup=0.5", "task.cutmix=1", "trainer.epochs=1", "norm=bn")
    one = train_here(arguments, tmp_path / "one")
    cut = [f"trainer.devices={devices}", f"trainer.passes={2 // devices}"]
    other = train_here([*arguments, *cut], tmp_path / "other")
    left, right = (last_state(run)["model"] for run in (one, other))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5, msg=name)


def task_with(**options: Any) -> Task:
    """Classification with 5 classes."""
    return make_task({**option_values("task", "classification"), **options}, [str(label) for label in range(5)])


def test_a_task_file_of_ones_own_may_lack_the_options() -> None:
    """As one that was written before they existed."""
    options = option_values("task", "classification")
    for key in ("loss", "mixup", "cutmix", "label_smoothing"):
        del options[key]
    task = make_task(options, [str(label) for label in range(5)])
    output, labels = torch.randn(8, 5), torch.arange(8) % 5
    loss = task.loss(output, (labels, labels), replicas=1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(output, labels))


def mixed(task: Task, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What the task makes of two replicas."""
    return task.mixed(images.clone(), (labels, labels), seeds=(1, 2))


def test_labels_are_mixed_as_images_are() -> None:
    """Mixup: an image is lam x + (1 - lam) x', and so is its label; x' is of the same replica."""
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    images = nn.functional.one_hot(labels, 5).float()[:, :3, None, None].expand(-1, -1, 4, 4)
    pixels, _, _, shares = mixed(task_with(mixup=1.0), images, labels)
    torch.testing.assert_close(pixels[:, :, 0, 0], shares[:, :3])
    assert ((shares > 0).sum(1) == 2).all() and len(shares.max(1).values.unique()) == 2
    pixels, _, _, shares = mixed(task_with(cutmix=1.0), images, labels)
    torch.testing.assert_close(pixels.mean((2, 3)), shares[:, :3])
    assert set(pixels.unique().tolist()) <= {0, 1}
    other = images.clone()
    other[4:] = 0.5
    changed = mixed(task_with(mixup=1.0), other, labels)[0]
    assert torch.equal(changed[:4], mixed(task_with(mixup=1.0), images, labels)[0][:4])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_the_cross_entropies_of_smoothed_labels(smoothing: float) -> None:
    """Of labels and of mixed labels: t (1 - s) + s / C."""
    output, labels = torch.randn(8, 5), torch.arange(8) % 5
    for loss in ("cross_entropy", "bce"):
        for mixup in (0.0, 0.4):
            task = task_with(loss=loss, mixup=mixup, label_smoothing=smoothing)
            _, *targets = mixed(task, torch.randn(8, 3, 2, 2), labels)
            plain = task_with(mixup=mixup)
            _, *hard = mixed(plain, torch.randn(8, 3, 2, 2), labels)
            target = hard[2] if mixup else nn.functional.one_hot(labels, 5).float()
            target = target * (1 - smoothing) + smoothing / 5
            expected = (
                nn.functional.binary_cross_entropy_with_logits(output, target)
                if loss == "bce"
                else -(target * output.log_softmax(1)).sum(1).mean()
            )
            torch.testing.assert_close(task.loss(output, targets, replicas=2), expected)
            torch.testing.assert_close(task.sums(output, targets), classification(classes=5).sums(output, targets[:2]))


def picture(seed: int = 0) -> Image.Image:
    """A smooth image of 40 x 40 pixels."""
    values = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((40, 40))


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", None])
def test_augmentation_is_behind_the_crop_and_erasing_leaves_the_mean(policy: str | None, padding: int | None) -> None:
    data = {"image_size": 32, "padding": padding, "mean": [0.5, 0.25, 0.75]}
    options = ({}, {"auto_augment": policy}, {"auto_augment": policy, "random_erasing": 1.0})
    transforms = [
        train_transform(OmegaConf.merge(OmegaConf.structured(DataConfig), {**data, **more})) for more in options
    ]
    mean = torch.tensor([128, 64, 191], dtype=torch.uint8)
    augmented, erased = [], []
    for seed in range(5):
        results = []
        for transform in transforms:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(transform(picture())[0])
        assert all(pixels.shape == (32, 32, 3) and pixels.dtype == torch.uint8 for pixels in results)
        augmented.append(not torch.equal(results[0], results[1]))
        changed = (results[1] != results[2]).any(2)
        erased.append(bool(changed.any()))
        assert (results[2][changed] == mean).all()
    assert any(augmented) is (policy is not None) and any(erased)


@pytest.mark.parametrize("name", ["rand-m10-inc1", "rand-m20-inc1", "v0", "original", "3a", "augmix-m10-w1-d3"])
def test_a_policy_keeps_at_least_one_bit_of_each_colour(name: str) -> None:
    """With 0 bits, Pillow 13 refuses the image and older ones make it black."""
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), {"auto_augment": name, "image_size": 32})
    augment = policy(config)
    bright = Image.new("RGB", (32, 32), (255, 255, 255))
    operations: Any = augment.transforms[0]  # pyright: ignore[reportAttributeAccessIssue]
    parts = [part for group in getattr(operations, "policy", [getattr(operations, "ops", [])]) for part in group]
    found = [part for part in parts if "Posterize" in part.name]
    assert found or name == "3a"
    for part in found:
        assert np.asarray(part.aug_fn(bright, 0)).max() == 128


def test_warm_up_in_steps() -> None:
    """Linear from 0, and the schedule begins behind it."""
    config = OmegaConf.structured(OptimConfig(lr=2.0, schedule="cosine", warmup=0.5, warmup_steps=4))
    rates = [learning_rate(config, step=step, steps=8, total_batch=256) for step in range(9)]
    assert rates[:5] == [0, 0.5, 1, 1.5, 2] and rates[6] == pytest.approx(1) and rates[8] == pytest.approx(0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.ema=1"], "trainer.ema=1 is not possible; give a decay between 0 and 1"),
        (["optim.clip_norm=0"], "optim.clip_norm=0 is not possible; give a number above 0"),
        (["optim.warmup_steps=0"], "optim.warmup_steps=0 is not possible; give 1 or more"),
        (["task.loss=hinge"], "task.loss=hinge is unknown; allowed: cross_entropy, bce"),
        (["task.mixup=-1"], "task.mixup=-1 is not possible; give a number from 0 up"),
        (["task.label_smoothing=2"], "task.label_smoothing=2 is not possible; give a number from 0 to 1"),
        (["task.mixup=0.2", "batch=2x3"], "which has 3 here. Choose a batch with an even number"),
        (["task.cutmix=1", "batch=1x8", "trainer.devices=2"], "on one device. Type trainer.devices=1"),
        (["data.auto_augment=rand-x9"], "data.auto_augment=rand-x9: timm cannot apply this policy"),
        (["data.auto_augment=nonsense"], "data.auto_augment=nonsense: timm cannot apply this policy"),
        (["data.auto_augment=augmix-a0"], "data.auto_augment=augmix-a0: timm cannot apply this policy"),
        (["optim.warmup_steps=12"], "optim.warmup_steps=12, but the run has 12 steps. Give fewer"),
        (["task.mixup=inf"], "task.mixup=inf is not possible; give a finite number"),
        (["optim.lr=nan"], "optim.lr=nan is not possible; give a finite number"),
        (["data.random_erasing=2"], "data.random_erasing=2 is not possible; give a probability, 0 to 1"),
        (["task=segmentation", "data=glyph_scenes", "data.random_erasing=0.5"], "glyph_scenes has masks"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, images: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    done = cli_here(*tiny(images, *words))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()
