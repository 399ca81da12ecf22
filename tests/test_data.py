"""Data: what is read, what is refused, and that a sample depends on (seed, epoch, index) alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from engine_cases import CLASSES, make_image_folder
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import data_set, fingerprint
from exnorm.data.loader import Loader, SeededImages, TrainBatches, fixed_batches
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.data.validation import matched


def folder_config(root: Path | None, **values: Any) -> Any:
    """The configuration of an image folder, with small crops."""
    config = compose_train(["data=imagefolder", "data.image_size=32", "data.resize=40"]).data
    return OmegaConf.merge(config, {"root": None if root is None else str(root), **values})


def seeded(root: Path, *, seed: int = 0) -> SeededImages:
    """The augmented training images of a folder."""
    config = folder_config(root)
    return SeededImages(data_set(config).load(config).train, train_transform(config), seed=seed)


def test_digits_are_1797_scans_with_a_fixed_disjoint_fifth_held_out() -> None:
    config = compose_train(["data=digits"]).data
    splits, again = (data_set(config).load(config) for _ in range(2))
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (1438, 359, 10)
    assert list(splits.val.labels) == list(again.val.labels)
    both = [images.open_image(i).tobytes() for images in (splits.train, splits.val) for i in range(len(images))]
    assert len(both) == 1797
    assert set(splits.val.labels) == set(range(10))
    pixels, labels = load_digits(return_X_y=True)
    wanted = Counter((int(label), *scan) for label, scan in zip(labels, pixels.astype(int).tolist(), strict=True))
    parts = [
        (int(images.labels[i]), *round_to_16(images.open_image(i)))
        for images in (splits.train, splits.val)
        for i in range(len(images))
    ]
    assert Counter(parts) == wanted


def round_to_16(image: Image.Image) -> list[int]:
    """The pixels of a scan, 0 to 16 as they were published."""
    return (np.asarray(image.convert("L"), dtype=float) * 16 / 255).round().astype(int).ravel().tolist()


def test_an_image_folder_reads_every_kind_of_image_as_rgb(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=2, val=1)
    for mode in ("L", "RGBA", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (9, 7)).save(root / "train" / "cat" / f"{mode}.{suffix}")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    config = folder_config(root)
    splits = data_set(config).load(config)
    assert splits.classes == list(CLASSES)
    assert len(splits.train) == 3 * 2 + 4
    assert {splits.train.open_image(i).mode for i in range(len(splits.train))} == {"RGB"}


def test_a_missing_or_empty_root_is_refused_with_the_layout(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_classes" / "train").mkdir(parents=True)
    (tmp_path / "no_classes" / "val").mkdir()
    for root in (None, tmp_path / "missing", tmp_path / "empty", tmp_path / "no_classes"):
        with pytest.raises(UserError, match=r"/<class>/\*\.jpg"):
            fingerprint(folder_config(root))


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=1, val=1)
    (root / "train" / "yak").mkdir()
    with pytest.raises(UserError, match=r"train.yak has no images"):
        fingerprint(folder_config(root))


def test_a_validation_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=1, val=1)
    (root / "val" / "cat").rename(root / "val" / "zebra")
    config = folder_config(root)
    with pytest.raises(UserError, match="zebra"):
        data_set(config).load(config)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=1, val=1)
    broken = root / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cat/0\.jpg is not a readable image .*data.exclude=FILE"):
        seeded(root)[0, 0]


def test_the_fingerprint_changes_with_names_and_sizes_but_not_with_the_place(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=2, val=1)
    before = fingerprint(folder_config(root))
    moved = root.rename(tmp_path / "elsewhere")
    assert fingerprint(folder_config(moved)) == before
    with open(moved / "val" / "cat" / "0.jpg", "ab") as stream:
        stream.write(b"x")
    grown = fingerprint(folder_config(moved))
    assert grown != before
    (moved / "val" / "cat" / "0.jpg").rename(moved / "val" / "cat" / "00.jpg")
    assert fingerprint(folder_config(moved)) not in (before, grown)


def epoch_of(dataset: SeededImages, *, epoch: int, workers: int, first_step: int = 0, **share: int) -> list[Any]:
    """The batches of an epoch from a step on."""
    batches = TrainBatches(len(dataset), total=8, seed=dataset.seed, **share)
    steps = batches.steps_per_epoch
    batches.between(epoch * steps + first_step, (epoch + 1) * steps)
    return list(Loader(dataset, batches, workers=workers, device=torch.device("cpu")))


def test_samples_do_not_depend_on_workers_or_on_where_the_epoch_was_entered(tmp_path: Path) -> None:
    dataset = seeded(make_image_folder(tmp_path / "data"))
    whole = epoch_of(dataset, epoch=3, workers=0)
    entered = epoch_of(dataset, epoch=3, workers=2, first_step=2)
    assert len(whole) == 6
    assert len(entered) == 4
    for batch, same in zip(whole[2:], entered, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))


def test_the_shares_of_the_ranks_are_the_global_batch(tmp_path: Path) -> None:
    dataset = seeded(make_image_folder(tmp_path / "data"))
    whole = epoch_of(dataset, epoch=0, workers=0)
    shares = [epoch_of(dataset, epoch=0, workers=0, rank=rank, ranks=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        for part, tensor in enumerate(batch):
            assert torch.equal(torch.cat([share[step][part] for share in shares]), tensor)


def test_epochs_and_seeds_differ_and_the_last_incomplete_batch_is_dropped(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", train=7)  # 21 images, 2 batches of 8
    first, second = (epoch_of(seeded(root), epoch=epoch, workers=0) for epoch in (0, 1))
    other = epoch_of(seeded(root, seed=1), epoch=0, workers=0)
    assert len(first) == 2
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_validation_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    """A white square in the middle of a black image fills the crop of a quarter of the resized side."""
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), (30, 10, 50, 30))
    crop = np.asarray(eval_transform(folder_config(tmp_path, image_size=20, resize=40)).crop(image))
    assert crop.shape == (3, 20, 20) and crop.dtype == np.uint8 and (crop == 255).all()


def test_a_batch_is_normalized_as_an_image_would_be(tmp_path: Path) -> None:
    """Against torchvision's conversion and normalization of the same pixels."""
    dataset = seeded(make_image_folder(tmp_path / "data"))
    config = folder_config(None)
    (images, labels, clean), *_ = epoch_of(dataset, epoch=0, workers=0)
    order = [index for _, index in next(iter(TrainBatches(len(dataset), total=8, seed=0)))]
    assert labels.tolist() == clean.tolist() == [dataset.images.labels[index] for index in order]
    for image, index in zip(images, order, strict=True):
        pixels = dataset[0, index][0].numpy()
        want = torchvision.transforms.Normalize(config.mean, config.std)(torchvision.transforms.ToTensor()(pixels))
        torch.testing.assert_close(image, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("image_size", "resize"), [(160, 212), (384, 450), (224, 256), (32, 32)])
def test_validation_resizes_to_exactly_the_pixels_asked_for(tmp_path: Path, image_size: int, resize: int) -> None:
    config = folder_config(tmp_path, image_size=image_size, resize=resize)
    assert f"size={resize}" in str(eval_transform(config).crop).replace("(", "").replace("[", "").split("CenterCrop")[0]


def test_a_set_is_matched_to_the_classes_of_a_run_by_name(tmp_path: Path) -> None:
    """Labels in the run's order, images of other classes left out, each image still with its own class."""
    config = folder_config(make_image_folder(tmp_path / "data"))
    splits = data_set(config).load(config)
    assert matched(splits, list(CLASSES), name="imagefolder") is splits
    for classes in (["elk", "cat", "dog"], ["elk", "dog"]):
        found = matched(splits, classes, name="imagefolder")
        assert found.classes == classes and len(found.val) == 7 * len(classes)
        for mine, whole in ((found.train, splits.train), (found.val, splits.val)):
            names = {whole.open_image(i).tobytes(): splits.classes[whole.labels[i]] for i in range(len(whole))}
            assert all(names[mine.open_image(i).tobytes()] == classes[mine.labels[i]] for i in range(len(mine)))


def test_a_run_with_classes_that_a_set_lacks_is_told_which(tmp_path: Path) -> None:
    config = folder_config(make_image_folder(tmp_path / "data"))
    splits = data_set(config).load(config)
    with pytest.raises(UserError) as problem:
        matched(splits, ["cat", "yak", "zebra"], name="imagefolder")
    assert str(problem.value) == (
        "data=imagefolder has 3 classes, and 2 of the run's 3 are not among them, such as yak, zebra; it has dog, elk "
        "instead"
    )


def test_fixed_batches_hold_every_index_once() -> None:
    batches = fixed_batches(range(1, 8), 3)
    assert batches == [[(0, 1), (0, 2), (0, 3)], [(0, 4), (0, 5), (0, 6)], [(0, 7)]]
