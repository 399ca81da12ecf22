"""Small images are decoded once: the same pixels as without the cache, and never those of another file."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from data_cases import accept_cifar10, make_cifar10, make_class_tars
from engine_cases import CLASSES, environment, make_image_folder, tiny
from omegaconf import OmegaConf
from PIL import Image

from exnorm.config.cache import cache_folder
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import decoded, fingerprint, load
from exnorm.data.loader import Loader, SeededImages, TrainBatches, fixed_batches
from exnorm.data.transforms import eval_transform, train_transform
from exnorm.engine.launch import identity

SIZE = 16  # pixels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise_image(draw: random.Random, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Pixels that do not compress."""
    return Image.frombytes("RGB", (width, height), draw.randbytes(width * height * 3))


def make_square(root: Path, *, train: int = 8, val: int = 4) -> Path:
    """Class folders with images of SIZE pixels."""
    draw = random.Random(0)
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise_image(draw).save(root / split / name / f"{index}.{'bmp' if index % 2 else 'jpg'}")
    return root


def config(root: Path, **values: Any) -> Any:
    """The configuration of a folder, with padded crops."""
    words = [
        "data=imagefolder",
        f"data.root={root}",
        f"data.image_size={SIZE}",
        f"data.resize={SIZE}",
        "data.padding=2",
    ]
    return OmegaConf.merge(compose_train(words).data, values)


def kept() -> list[Path]:
    """The files of decoded images in the cache."""
    return sorted(cache_folder().glob("decoded-*.bin"))


def epoch_of(given: Any, *, training: bool, workers: int = 0, epoch: int = 0) -> list[Any]:
    """The batches of an epoch, of which the last one in validation has another size."""
    splits = load(given)
    images = splits.train if training else splits.val
    transform = (train_transform if training else eval_transform)(given)
    dataset = SeededImages(images, transform, seed=3)
    batches: Any = fixed_batches(range(len(images)), 5)
    if training:
        batches = TrainBatches(len(images), total=8, seed=3)
        batches.between(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return list(Loader(dataset, batches, workers=workers, device=torch.device("cpu")))


def assert_equal(left: list[Any], right: list[Any]) -> None:
    """Equal batches, in their types, too."""
    assert len(left) == len(right) > 0
    for batch, other in zip(left, right, strict=True):
        for tensor, same in zip(batch, other, strict=True):
            assert tensor.dtype == same.dtype and torch.equal(tensor, same)


@pytest.mark.parametrize("seed", range(12))
def test_batches_of_decoded_images_are_those_of_their_files(tmp_path: Path, seed: int) -> None:
    """For random crops, epochs and loaders, and for images that are not cropped together."""
    draw = random.Random(seed)
    size = draw.choice([SIZE, SIZE, SIZE, 12, 20])
    values: dict[str, Any] = {
        **{"image_size": size, "resize": max(size, draw.choice([SIZE, 24])), "hflip": draw.choice([0.0, 0.3, 1.0])},
        "padding": draw.choice([None, 0, 1, 4]),
    }
    root = make_square(tmp_path / "images")
    for training in (True, False):
        chosen = {"training": training, "epoch": draw.randrange(3), "workers": draw.choice([0, 2])}
        without = epoch_of(config(root, cache=False, **values), **chosen)
        assert not kept()
        assert_equal(epoch_of(config(root, cache=True, **values), **chosen), without)
        assert kept()
        for file in kept():
            file.unlink()


def test_the_images_of_a_set_in_memory_are_those_opened_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR's archive and the drawn sets are decoded already."""
    root = make_cifar10(tmp_path / "cifar")
    accept_cifar10(root, monkeypatch)
    for words in (["data=cifar10", f"data.root={root}"], ["data=glyphs", "data.num_train=20", "data.num_val=10"]):
        given = compose_train([*words, "data.padding=4"]).data
        for split, transform in (("train", train_transform(given)), ("val", eval_transform(given))):
            dataset = SeededImages(getattr(load(given), split), transform, seed=1)
            keys = [(2, index) for index in (3, 0, 7)]
            pixels, labels, _ = dataset.__getitems__(keys)
            assert dataset.images.read_pixels is not None
            assert torch.equal(pixels, torch.stack([dataset[key][0] for key in keys]))
            assert labels.tolist() == [dataset[key][1] for key in keys]


def test_images_of_tar_files_are_kept_too(tmp_path: Path) -> None:
    root = make_class_tars(tmp_path / "tars", make_square(tmp_path / "images"))
    for training in (True, False):
        assert_equal(
            epoch_of(config(root, source="tar"), training=training),
            epoch_of(config(tmp_path / "images", cache=False), training=training),
        )
    assert len(kept()) == 2


def test_images_are_decoded_once(tmp_path: Path) -> None:
    """Only the first file is read afterwards, for the size of the images."""
    root = make_square(tmp_path / "images")
    before = epoch_of(config(root), training=True)
    for file in root.rglob("[1-9].*"):
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_equal(epoch_of(config(root), training=True), before)


@pytest.mark.parametrize("number", [1, 101, 295])
def test_a_file_that_is_written_again_is_decoded_again(tmp_path: Path, number: int) -> None:
    """Each of many, also one of the same size."""
    root = make_square(tmp_path / "images", train=300)
    load(config(root))
    file = root / "train" / "cat" / f"{number}.bmp"
    changed = noise_image(random.Random(5))
    size = file.stat().st_size
    changed.save(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))
    assert file.stat().st_size == size
    images = load(config(root)).train
    assert changed.tobytes() in {images.open_image(index).tobytes() for index in range(len(images))}


def test_large_images_and_images_of_different_sizes_are_not_kept_unasked(tmp_path: Path) -> None:
    root = make_square(tmp_path / "mixed")
    noise_image(random.Random(1), 20, 10).save(root / "train" / "cat" / "3.bmp")
    assert len(epoch_of(config(root), training=True)) == 3
    assert len(kept()) == 1  # validation
    with pytest.raises(UserError, match=r"data.cache=true: images 3 and 0 have 20 x 10 and 16 x 16 pixels"):
        load(config(root, cache=True))
    kept()[0].unlink()
    large = make_square(tmp_path / "large")
    for file in large.rglob("*.*"):
        noise_image(random.Random(2), 65, 65).save(file)
    load(config(large))
    assert not kept()
    load(config(large, cache=True))
    assert len(kept()) == 2


def test_a_broken_image_is_refused_or_replaced_as_without_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is found once, and said of many images."""
    monkeypatch.setattr(decoded, "MANY", 20)
    root = make_square(tmp_path / "images")
    (root / "train" / "cat" / "2.jpg").write_bytes(b"no image")
    assert load(config(root)).train.read_pixels is None
    assert "the images are opened one by one, because train/cat/2.jpg" in capsys.readouterr().err
    decode = mock.Mock(side_effect=AssertionError("decoded again"))
    with mock.patch("exnorm.data.decoded._decode_all", decode):
        assert load(config(root)).train.read_pixels is None
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"data.cache=true: train.cat.2.jpg is not a readable image .*data.exclude"):
        load(config(root, cache=True))
    assert len(kept()) == 1  # validation


def test_processes_that_begin_at_once_make_one_file(tmp_path: Path) -> None:
    """Every rank of a training does."""
    root = make_square(tmp_path / "images", train=300)
    code = (
        "import sys, hashlib; from exnorm.config.compose import compose_train; from exnorm.data import load\n"
        "pixels = load(compose_train(sys.argv[1:]).data).train.read_pixels(list(range(900)))\n"
        "print(hashlib.sha256(pixels.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code, "data=imagefolder", f"data.root={root}"]
    processes = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(3)
    ]
    hashes = {process.communicate(timeout=600)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(hashes) == 1 and len(kept()) == 2
    assert not list(cache_folder().glob("*.part"))


def test_the_cache_is_not_in_the_hash_of_a_run(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    hashes = set()
    for word in ("data.cache=true", "data.cache=false", "data.cache=null"):
        composed = compose_train(tiny(root, word)[1:])
        hashes.add(identity(composed, OmegaConf.to_container(composed, resolve=True)))
    assert len(hashes) == 1


def test_a_cache_that_is_asked_for_where_there_is_none_is_refused(tmp_path: Path) -> None:
    for words, line in (
        (["data=glyph_scenes"], "data.cache=true: glyph_scenes has masks"),
        (["data=digits"], "data.cache=true: digits has no files to decode"),
        (
            ["data=imagenet", "data.source=hfds/some/set"],
            "data.cache=true: data.source=hfds/some/set has its",
        ),
    ):
        with pytest.raises(UserError, match=line):
            fingerprint(compose_train([*words, "data.cache=true"]).data)
