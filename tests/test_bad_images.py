"""Broken files, made for real: replaced and listed in training, refused in validation; odd ones read as they should."""

import csv
import errno
import io
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CliRunner
from data_cases import SMALL, WNIDS, class_of, config_of, make_imagenet, odd_exif, save
from engine_cases import assert_same_run, only_run, start, train_here, wait_for, workers
from PIL import Image

from exnorm import data
from exnorm.config.errors import UserError
from exnorm.data.bad_images import BadImages
from exnorm.data.files import BadImage
from exnorm.data.loader import SeededImages
from exnorm.data.transforms import eval_transform

TINY = ("model=resnet18", "model.name=test_resnet", "logger=off", "ops.backend=eager", "batch=1x4", "norm=bn")


def truncated(path: Path) -> None:
    """Half of a JPEG."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def html(path: Path) -> None:
    """The page that says that the image is gone."""
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def bomb(path: Path) -> None:
    """A small PNG that says it has 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def forbidden(path: Path) -> None:
    """A file without permission to read."""
    path.chmod(0)


def a_folder(path: Path) -> None:
    """A folder where a list has an image."""
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b"") and None,
    "html": html,
    "bomb": bomb,
    "vanished": Path.unlink,
    "forbidden": forbidden,
    "folder": a_folder,
    "noise": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256))) and None,
}


def listed_imagenet(root: Path) -> Any:
    """A miniature of ImageNet that is read from list files, which do not notice what becomes of the files."""
    make_imagenet(root)
    for split in ("train", "val"):
        lines = [f"{file.relative_to(root)} {file.parent.name}\n" for file in sorted((root / split).glob("*/*"))]
        (root / f"{split}.txt").write_text("".join(lines))
    return config_of("imagenet", root, train_list="train.txt", val_list="val.txt", max_bad_fraction=0.5)


def train_images(config: Any, file: Path) -> SeededImages:
    """The training images as the trainer has them."""
    images = data.load(config).train
    bad = BadImages(file, data="imagenet", images=len(images), max_fraction=config.max_bad_fraction)
    return SeededImages(images, eval_transform(config), seed=0, bad_images=bad)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_training_image_is_replaced_by_the_next_good_one_of_its_class_and_listed(
    tmp_path: Path, case: str
) -> None:
    if case == "forbidden" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    config = listed_imagenet(tmp_path / "in")
    victim = tmp_path / "in" / "train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG"
    BROKEN[case](victim)
    dataset = train_images(config, tmp_path / "bad.csv")
    stand_in = dataset[0, 6 + 4]
    for _ in range(2):
        pixels, label, clean = dataset[0, 6 + 3]
        assert (pixels == stand_in[0]).all() and label == clean == 1
    header, row = csv.reader((tmp_path / "bad.csv").read_text().splitlines())
    assert header == ["data", "index", "path", "reason"]
    assert row[:3] == ["imagenet", "9", str(victim.relative_to(tmp_path / "in"))]
    assert row[3] and str(tmp_path) not in row[3] and "0x" not in row[3]


def test_what_stands_in_is_good_itself_and_goes_round(tmp_path: Path) -> None:
    """The last image of a class is followed by its first; a class without a good image is an error."""
    config = listed_imagenet(tmp_path / "in")
    files = [tmp_path / "in" / "train" / WNIDS[2] / f"{WNIDS[2]}_{number}.JPEG" for number in range(6)]
    truncated(files[5]), html(files[0])
    dataset = train_images(config, tmp_path / "bad.csv")
    assert (dataset[0, 17][0] == dataset[0, 13][0]).all()
    assert [index for _, index, _, _ in dataset.bad_images.rows()] == ["12", "17"]  # type: ignore[union-attr]
    for file in files[1:5]:
        file.unlink()
    with pytest.raises(UserError, match="all 6 images of label 2 are broken, such as train/"):
        dataset[0, 17]


def test_a_class_without_a_good_image_is_told_by_an_image_of_its_own(tmp_path: Path) -> None:
    """And not by the first broken one of the set, which may be of any class."""
    config = listed_imagenet(tmp_path / "in")
    truncated(tmp_path / "in" / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG")
    for number in range(6):
        html(tmp_path / "in" / "train" / WNIDS[2] / f"{WNIDS[2]}_{number}.JPEG")
    dataset = train_images(config, tmp_path / "bad.csv")
    dataset[0, 1]
    own = rf"label 2 are broken, such as train/{WNIDS[2]}/{WNIDS[2]}_3\.JPEG \(the image format is not known"
    with pytest.raises(UserError, match=own):
        dataset[0, 15]


def test_too_many_broken_images_are_an_error_that_names_one(tmp_path: Path) -> None:
    config = listed_imagenet(tmp_path / "in")
    for number in (1, 4):
        truncated(tmp_path / "in" / "train" / WNIDS[0] / f"{WNIDS[0]}_{number}.JPEG")
    dataset = train_images(config, tmp_path / "bad.csv")
    bad = BadImages(tmp_path / "bad.csv", data="imagenet", images=18, max_fraction=1 / 18)  # another process
    dataset[0, 1]
    bad.check()
    dataset[0, 4]
    with pytest.raises(UserError, match=r"2 of 18 training images of imagenet are broken, such as .*_1\.JPEG"):
        bad.check()


def test_a_broken_validation_image_is_an_error_unless_it_is_excluded(tmp_path: Path) -> None:
    config = listed_imagenet(tmp_path / "in")
    victim = sorted((tmp_path / "in" / "val" / WNIDS[0]).iterdir())[0]
    truncated(victim)
    with pytest.raises(UserError, match=rf"val/{WNIDS[0]}/{victim.name} is not a readable image .*data\.exclude=FILE"):
        SeededImages(data.load(config).val, eval_transform(config), seed=0)[0, 0]
    (tmp_path / "bad.txt").write_text(f"{victim}\n")
    config.exclude = str(tmp_path / "bad.txt")
    val = data.load(config).val
    assert len(val) == 11
    SeededImages(val, eval_transform(config), seed=0)[0, 0]


def test_the_list_of_a_run_may_be_excluded_as_it_is(tmp_path: Path) -> None:
    """Also after a spreadsheet has saved it, and with odd names; it leaves out the same images as their paths would."""
    config = listed_imagenet(tmp_path / "in")
    names = [f"{WNIDS[0]}_1.JPEG", 'a, "b".JPEG']
    folder = tmp_path / "in" / "train" / WNIDS[0]
    (folder / f"{WNIDS[0]}_4.JPEG").rename(folder / names[1])
    (tmp_path / "in" / "train.txt").write_text(
        (tmp_path / "in" / "train.txt").read_text().replace(f"{WNIDS[0]}_4.JPEG", names[1])
    )
    for name in names:
        truncated(folder / name)
    dataset = train_images(config, tmp_path / "bad.csv")
    dataset[0, 1], dataset[0, 4]
    (tmp_path / "paths.txt").write_text("".join(f"train/{WNIDS[0]}/{name}\n" for name in names))
    saved = (tmp_path / "bad.csv").read_text().replace("\n", "\r\n")
    (tmp_path / "saved.csv").write_text(saved, encoding="utf-8-sig", newline="")
    found = []
    for name in ("paths.txt", "bad.csv", "saved.csv"):
        config.exclude = str(tmp_path / name)
        train = data.load(config).train
        assert (len(train), train.excluded) == (16, 2)
        found.append((data.fingerprint(config), list(train.labels)))
    assert found[0] == found[1] == found[2]


def test_a_broken_image_has_its_reason() -> None:
    """Of the system where it has one, else of the decoder."""
    with pytest.raises(BadImage) as missing:
        data.files.opened("gone.jpg", partial(open, "/nonexistent/gone.jpg", "rb"))
    assert (missing.value.name, missing.value.reason) == ("gone.jpg", "No such file or directory")
    with pytest.raises(BadImage, match="the image format is not known"):
        data.files.opened("page.jpg", lambda: io.BytesIO(b"<html>"))


def test_what_is_wrong_with_the_machine_makes_no_image_broken() -> None:
    """A share that is away for a moment would replace good images by others, silently."""

    def away() -> io.BytesIO:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match=r"a\.jpg cannot be read now: .*Input/output error. The same command continues"):
        data.files.opened("a.jpg", away)


def test_images_that_were_mended_are_forgotten_at_the_next_start(tmp_path: Path) -> None:
    """Else a run that ended for too many broken images could never go on."""
    config = listed_imagenet(tmp_path / "in")
    files = [tmp_path / "in" / "train" / WNIDS[0] / f"{WNIDS[0]}_{number}.JPEG" for number in (1, 4)]
    for file in files:
        truncated(file)
    dataset = train_images(config, tmp_path / "bad.csv")
    dataset[0, 1], dataset[0, 4]
    save(files[0], WNIDS[0])
    bad = BadImages(tmp_path / "bad.csv", data="imagenet", images=18, max_fraction=1 / 18)
    with pytest.raises(UserError, match="2 of 18"):
        bad.check()
    bad.look_again(data.load(config).train)
    bad.check()
    assert [index for _, index, _, _ in bad.rows()] == ["4"]


def centre(path: Path) -> tuple[int, ...]:
    """The pixel in the middle of the one image of a folder of classes."""
    image = data.files.opened(str(path), lambda: path.open("rb"))
    assert image.mode == "RGB"
    pixel = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(pixel, tuple)
    return pixel


def near(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal up to the compression of a JPEG."""
    return all(abs(a - b) <= 6 for a, b in zip(found, wanted, strict=True))


def test_odd_images_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    red = Image.new("RGB", (30, 20), (200, 40, 60))
    red.save(tmp_path / "wrong.jpg", "PNG")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.save(tmp_path / "wide.jpg")
    Image.new("L", (9, 9), 77).save(tmp_path / "grey.jpg")
    Image.new("RGBA", (9, 9), (200, 40, 60, 30)).save(tmp_path / "alpha.png")
    palette = red.quantize(4)
    palette.info["transparency"] = bytes([9, 200, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=bytes([9, 200, 255, 0]))
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")])
    Image.new("RGB", (1, 1), (200, 40, 60)).save(tmp_path / "one.png")
    for name in ("wrong.jpg", "cmyk.jpg", "wide.jpg", "alpha.png", "palette.png", "moving.gif", "one.png"):
        assert near(centre(tmp_path / name), (200, 40, 60)), name
    assert near(centre(tmp_path / "grey.jpg"), (77, 77, 77))


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """65,535 is white and 0 black; Pillow alone would clip at 255."""
    for value, wanted in ((0, 0), (257 * 100, 100), (65535, 255)):
        Image.fromarray(np.full((5, 5), value, np.uint16)).save(tmp_path / "deep.png")
        assert centre(tmp_path / "deep.png") == (wanted,) * 3


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_scaled_by_the_white_that_fits(tmp_path: Path, white: int) -> None:
    """Pillow alone would make all of an image from 0 to 1 black."""
    values = np.linspace(0, white, 25, dtype=np.float32).reshape(5, 5)
    Image.fromarray(values).save(tmp_path / "float.tif")
    image = data.files.opened("float.tif", lambda: (tmp_path / "float.tif").open("rb"))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0] - values * (255 / white)).max() <= 1


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1e6), (0.0, float("nan"))])
def test_floats_of_which_none_is_known_to_be_white_are_a_broken_image(
    tmp_path: Path, values: tuple[float, float]
) -> None:
    Image.fromarray(np.array([values, values], np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImage, match="floats from .* allowed are 0 to 1, 0 to 255 and 0 to 65535"):
        data.files.opened("float.tif", lambda: (tmp_path / "float.tif").open("rb"))


def test_the_rotation_in_exif_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.files.opened("turned.jpg", lambda: (tmp_path / "turned.jpg").open("rb")).size == (30, 20)


@pytest.mark.parametrize("name", ["鳥 ü.jpg", "a b\tc.JPG", "x" * 240 + ".jpg", os.fsdecode(b"latin\xe9.jpg")])
def test_names_of_any_kind_are_found_and_read(tmp_path: Path, name: str) -> None:
    """Also in a folder that is named like an image."""
    root = make_imagenet(tmp_path / "in", train=1)
    file = save(tmp_path / "image.jpg", WNIDS[2])
    for folder in (root / "train" / WNIDS[2], root / "train" / WNIDS[2] / "folder.jpg"):
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder / name)
    splits = data.load(config_of("imagenet", root))
    assert list(splits.train.labels) == [0, 1, 2, 2, 2]
    assert [class_of(splits.train, index) for index in (2, 3, 4)] == [WNIDS[2]] * 3
    data.fingerprint(config_of("imagenet", root))


def broken_root(tmp_path: Path) -> Path:
    """Two broken training images among 24, and one in validation that is excluded."""
    root = make_imagenet(tmp_path / "in", train=8)
    truncated(root / "train" / WNIDS[0] / f"{WNIDS[0]}_3.JPEG")
    html(root / "train" / WNIDS[2] / f"{WNIDS[2]}_7.JPEG")
    return root


def listed(run: Path) -> list[str]:
    """The names of the broken images in a run folder."""
    return [Path(row["path"]).name for row in csv.DictReader((run / "bad_images.csv").read_text().splitlines())]


@pytest.mark.slow
def test_a_run_lists_its_broken_images_and_is_equal_after_a_kill(tmp_path: Path) -> None:
    """With loader processes; the same weights, metrics and list as without the kill."""
    root = broken_root(tmp_path)
    arguments = ["train", "data=imagenet", f"data.root={root}", *SMALL, *TINY, "data.workers=2"]
    arguments += ["data.max_bad_fraction=0.1", "trainer.epochs=6", "trainer.checkpoint_every_steps=1"]
    whole = train_here(arguments, tmp_path / "whole")
    assert listed(whole) == [f"{WNIDS[0]}_3.JPEG", f"{WNIDS[2]}_7.JPEG"]
    assert json.loads((whole / "record.json").read_text())["bad_images"] == 2
    (tmp_path / "killed").mkdir()
    process = start(arguments, tmp_path / "killed")
    wait_for(lambda: list((tmp_path / "killed").glob("runs/*/*/checkpoints/step-*7.pt")), "a checkpoint")
    process.kill()
    process.communicate()
    wait_for(lambda: not workers(str(tmp_path / "killed")), "the workers to end")
    again = train_here(arguments, tmp_path / "killed")
    assert_same_run(whole, again)
    assert listed(again) == listed(whole)


@pytest.mark.slow
def test_a_run_ends_with_its_broken_images_and_their_list_leaves_them_out(tmp_path: Path, run_cli: CliRunner) -> None:
    """What Pillow warns of is one line, however many loader processes see it."""
    root = broken_root(tmp_path)
    (root / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").write_bytes(odd_exif())
    arguments = ["train", "data=imagenet", f"data.root={root}", *SMALL, *TINY, "data.workers=2", "trainer.epochs=2"]
    done = run_cli(*arguments, "data.max_bad_fraction=0.1")
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    listing = run.relative_to(tmp_path) / "bad_images.csv"
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"2 broken training images were replaced by others of the same label. {listing} lists them")
    assert "Corrupt EXIF" not in done.stderr and done.stdout.count("Corrupt EXIF") == 1
    assert re.search(r"^Pillow warned \d+ times, first: Corrupt EXIF", done.stdout, re.MULTILINE)
    again = run_cli(*arguments, f"data.exclude={listing}")
    assert again.returncode == 0, again.stderr
    (record,) = [path for path in tmp_path.glob("runs/*/*/record.json") if path.parent != run]
    numbers = json.loads(record.read_text())
    assert (numbers["bad_images"], numbers["train_images"], numbers["excluded_images"]["train"]) == (0, 22, 2)


@pytest.mark.slow
def test_a_broken_validation_image_ends_a_run_with_one_line_and_the_earlier_run_is_kept(
    tmp_path: Path, run_cli: CliRunner
) -> None:
    """Started over where it cannot even begin, a finished run is what it was."""
    root = make_imagenet(tmp_path / "in")
    arguments = ("train", "data=imagenet", f"data.root={root}", *SMALL, *TINY, "data.workers=1", "trainer.epochs=1")
    run = train_here([*arguments], tmp_path)
    record = (run / "record.json").read_text()
    victim = sorted((root / "val" / WNIDS[1]).iterdir())[0]
    victim.write_bytes(b"x" * victim.stat().st_size)  # of another size it would be another run
    done = run_cli(*arguments, "fresh=true")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"val/{WNIDS[1]}/{victim.name} is not a readable image" in done.stderr
    assert only_run(tmp_path) == run and (run / "record.json").read_text() == record
