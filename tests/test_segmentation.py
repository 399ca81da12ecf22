"""Segmentation: its loss over replicas, its confusion matrix, its transforms, and what a network sees of an image."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from exnorm.config.errors import UserError
from exnorm.config.groups import option_values
from exnorm.config.schema import DataConfig
from exnorm.data.loader import SeededImages
from exnorm.data.mask_transforms import centre_transform, eval_transform, train_transform
from exnorm.data.splits import IGNORED, MaskedImages
from exnorm.tasks.base import Views
from exnorm.tasks.segmentation import Segmentation, replica_mean, starts

CLASSES = ("sky", "road", "a car/van", "tree")


def task(**options: Any) -> Segmentation:
    """A task of four classes."""
    return Segmentation({**option_values("task", "segmentation"), **options}, CLASSES)


def random_batch(samples: int = 4, size: int = 12, *, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and masks of noise, with a different share of ignored pixels in each sample."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, size, size, generator=generator)
    masks = torch.randint(0, classes, (samples, size, size), generator=generator).to(torch.uint8)
    for sample, mask in enumerate(masks):
        mask[torch.rand(size, size, generator=generator) < sample / samples] = IGNORED
    return logits, masks


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_each_replica_divides_by_its_own_valid_pixels(replicas: int) -> None:
    """As GPUs would, each with its own cross-entropy, before their mean."""
    logits, masks = random_batch()
    expected = torch.stack(
        [
            cross_entropy(part, mask.long(), ignore_index=IGNORED)
            for part, mask in zip(logits.chunk(replicas), masks.chunk(replicas), strict=True)
        ]
    ).mean()
    assert torch.allclose(replica_mean(logits, masks, replicas=replicas, group=None), expected)
    whole = replica_mean(logits, masks, replicas=1, group=None)
    assert replicas == 1 or not torch.allclose(whole, expected)  # the samples have different numbers of pixels


def test_a_replica_without_a_valid_pixel_adds_nothing() -> None:
    """A crop may show only what has no class."""
    logits, masks = random_batch()
    masks[2:] = IGNORED
    logits.requires_grad_()
    loss = replica_mean(logits, masks, replicas=2, group=None)
    loss.backward()
    assert torch.allclose(loss, cross_entropy(logits[:2], masks[:2].long(), ignore_index=IGNORED) / 2)
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[2:].any()


def test_the_auxiliary_head_counts_by_its_weight_and_logits_are_enlarged_to_the_mask() -> None:
    logits, masks = random_batch()
    small = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    large = nn.functional.interpolate(small, (12, 12), mode="bilinear")
    found = task(aux_weight=0.4).loss((logits, small), [masks], replicas=1)
    parts = [cross_entropy(part, masks.long(), ignore_index=IGNORED) for part in (logits, large)]
    assert torch.allclose(found, parts[0] + 0.4 * parts[1])
    reduced = task(aux_weight=0.4, loss_at="head").loss((small,), [masks], replicas=1)
    assert torch.allclose(reduced, cross_entropy(small, masks[:, 2::4, 2::4].long(), ignore_index=IGNORED))


def test_options_of_the_loss_that_cannot_be_are_one_line() -> None:
    for options in ({"loss_at": "mask"}, {"aux_weight": -0.1}):
        with pytest.raises(UserError, match="loss_at can be image or head, and aux_weight 0 or more"):
            task(**options)


def naive(logits: Tensor, masks: Tensor) -> np.ndarray:
    """The confusion matrix, pixel by pixel."""
    matrix = np.zeros((4, 4), np.int64)
    for predicted, true in zip(logits.argmax(1).flatten().tolist(), masks.flatten().tolist(), strict=True):
        if true != IGNORED:
            matrix[true, predicted] += 1
    return matrix


def test_metrics_are_those_of_the_confusion_matrix_over_all_batches() -> None:
    """Batches add up before anything is divided."""
    segmentation = task()
    batches = [random_batch(2, 9, seed=seed) for seed in range(3)]
    total = torch.stack([segmentation.sums(logits, [masks]) for logits, masks in batches]).sum(0)
    matrix = sum(naive(logits, masks) for logits, masks in batches)
    iou = [100 * matrix[i, i] / (matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]) for i in range(4)]
    found = segmentation.summarize(total)
    assert found["miou"] == pytest.approx(np.mean(iou)) and found["iou/a_car-van"] == pytest.approx(iou[2])
    assert found["pixel_accuracy"] == pytest.approx(100 * np.trace(matrix) / matrix.sum())
    assert found["mean_accuracy"] == pytest.approx(100 * np.mean(np.diag(matrix) / matrix.sum(1)))
    losses = [cross_entropy(x, y.long(), ignore_index=IGNORED, reduction="sum") for x, y in batches]
    assert found["loss"] == pytest.approx(float(sum(losses)) / matrix.sum(), rel=1e-5)
    assert found["undefined_classes"] == 0
    assert {metric.name for metric in segmentation.metrics} <= found.keys()


def test_a_class_that_does_not_occur_is_not_defined_and_in_no_mean() -> None:
    """Even if it is predicted somewhere."""
    segmentation = task()
    logits, masks = random_batch()
    masks[masks == 3] = IGNORED
    found = segmentation.summarize(segmentation.sums(logits, [masks]))
    assert math.isnan(found["iou/tree"]) and found["undefined_classes"] == 1
    defined = [found[f"iou/{name}"] for name in ("sky", "road", "a_car-van")]
    assert found["miou"] == pytest.approx(np.mean(defined))


def test_nothing_valid_is_not_a_number_and_not_an_error() -> None:
    logits, masks = random_batch()
    found = task().summarize(task().sums(logits, [torch.full_like(masks, IGNORED)]))
    assert math.isnan(found["miou"]) and found["undefined_classes"] == 4 and found["loss"] == 0


def test_counts_stay_exact_above_what_float32_can_count() -> None:
    side = 4097
    assert side * side > 2**24
    logits = torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1).expand(1, 4, side, side)
    sums = task().sums(logits, [torch.zeros(1, side, side, dtype=torch.uint8)])
    assert sums[1:3].tolist() == [side * side, side * side]


class Pointwise(nn.Module):
    """A network that looks at each pixel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def images_of(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_windows_and_flips_change_nothing_for_a_network_that_sees_pixels_alone() -> None:
    segmentation, network, images = task(), Pointwise(), images_of(20, 33)
    plain = segmentation.predict(network, images, (20, 33), Views(20))
    assert torch.allclose(plain, network(images).log_softmax(1), atol=1e-6)
    for views in (Views(20, flip=True), Views(20, window=16), Views(20, window=20, flip=True)):
        assert torch.allclose(segmentation.predict(network, images, (20, 33), views), plain, atol=1e-5), views


@torch.no_grad()
def test_the_mean_over_scales_is_that_of_probabilities_at_the_size_of_the_mask() -> None:
    segmentation, network, images = task(), Pointwise(), images_of(20, 30)
    shares = [
        segmentation.predict(network, images, (40, 60), Views(20, scales=(scale,))).exp() for scale in (0.5, 1.0, 2.0)
    ]
    assert shares[0].shape == (2, 4, 40, 60)
    found = segmentation.predict(network, images, (40, 60), Views(20, scales=(0.5, 1.0, 2.0))).exp()
    assert torch.allclose(found, sum(shares) / 3, atol=1e-6)


@torch.no_grad()
def test_the_network_sees_the_shorter_side_at_the_wanted_size() -> None:
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return images.new_zeros(2, 4, 3, 3)

    model: Any = network
    task().predict(model, images_of(40, 60), (40, 60), Views(20, scales=(1.0, 1.5), window=18))
    assert set(seen) == {(18, 18)}
    seen.clear()
    task().predict(model, images_of(40, 60), (40, 60), Views(20, scales=(1.0, 1.5)))
    assert seen == [(20, 30), (30, 45)]


@pytest.mark.parametrize(("length", "side"), [(64, 64), (65, 64), (200, 64), (96, 32), (7, 1)])
def test_windows_cover_an_image_and_stay_inside(length: int, side: int) -> None:
    places = starts(length, side)
    assert places[0] == 0 and places[-1] == length - side
    assert all(after - before <= side for before, after in itertools.pairwise(places))


def test_a_window_larger_than_the_image_is_one_line() -> None:
    with pytest.raises(UserError, match="test.window=32 is larger than an image of 20 x 30 px. Give at most 20, or"):
        task().predict(Pointwise(), images_of(20, 30), (20, 30), Views(20, window=32))


COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 240]], np.uint8)


def painted(count: int = 6) -> MaskedImages:
    """Images in which the colour of a pixel tells its class, in rectangles of different sizes."""

    def mask(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        return np.kron(rng.integers(0, 4, (5, 7)), np.ones((8, 8))).astype(np.uint8)

    return MaskedImages(
        count,
        lambda index: Image.fromarray(COLOURS[mask(index)]),
        lambda index: Image.fromarray(mask(index)),
    )


def config(**options: Any) -> Any:
    values = {"name": "painted", "image_size": 32, "resize": 40, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return OmegaConf.merge(OmegaConf.structured(DataConfig), values, options)


@pytest.mark.parametrize(
    "options",
    [
        {"hflip": 1.0},
        {"hflip": 0.0, "zoom": [0.4, 2.0]},
        {"short_sides": [24, 48, 60], "long_side": 70},
        {"rotation": 30.0},
        {"blur": 1.0, "zoom": [1.0, 3.0]},
    ],
)
def test_image_and_mask_are_cut_out_together(options: dict[str, Any]) -> None:
    """A pixel's colour still tells its class; what lies outside of the image is ignored and has the mean colour."""
    dataset = SeededImages(painted(), train_transform(config(**options)), seed=0)
    checked = outside = grey = 0
    for epoch in range(4):
        for index in range(len(dataset)):
            pixels, mask = dataset[epoch, index]
            assert pixels.shape == (32, 32, 3) and mask.shape == (32, 32) and pixels.dtype == mask.dtype == torch.uint8
            distances = (pixels.int()[:, :, None] - torch.from_numpy(COLOURS).int()).abs().sum(-1)
            clear = (distances.min(-1).values < 60) & (mask != IGNORED)  # not on a border between colours
            agree = distances.argmin(-1)[clear] == mask[clear]
            assert agree.float().mean() > 0.97
            checked += int(clear.sum())
            beyond = pixels[mask == IGNORED].int()
            outside, grey = outside + len(beyond), grey + int(((beyond - 127).abs().sum(-1) <= 3).sum())
    assert checked > 5000 and grey >= 0.6 * outside  # a rotation blends colours at the border
    assert bool(outside) == (options.get("zoom", [1])[0] < 0.8 or "rotation" in options or "short_sides" in options)


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    random_transform = train_transform(config(zoom=[0.5, 2.0], hflip=0.5))

    def sample(seed: int, epoch: int, index: int) -> Tensor:
        return SeededImages(painted(), random_transform, seed=seed)[epoch, index][0]

    torch.rand(3)
    assert torch.equal(sample(0, 1, 2), sample(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(sample(0, 1, 2), sample(*other))


def test_validation_takes_complete_images_and_the_centre_has_one_size() -> None:
    pixels, mask = SeededImages(painted(), eval_transform(config()), seed=0)[0, 0]
    assert pixels.shape == (40, 56, 3) and np.array_equal(mask, np.asarray(painted().open_mask(0)))
    pixels, mask = SeededImages(painted(), centre_transform(config()), seed=0)[0, 0]
    assert pixels.shape == (32, 32, 3) and np.array_equal(mask, np.asarray(painted().open_mask(0))[4:36, 12:44])
