"""The layouts of ImageNet, WebVision and CIFAR: each image with its own class, in the classes' own order."""

import gzip
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CliRunner
from data_cases import (
    PLACES,
    SMALL,
    WEBVISION_ORDER,
    WNIDS,
    accept_cifar10,
    class_of,
    config_of,
    flatten_val,
    labelled_right,
    make_cifar10,
    make_class_tars,
    make_imagenet,
    make_shards,
    make_webvision,
    save,
)
from engine_cases import only_run, train_here
from scipy.io import savemat

from exnorm import data
from exnorm.config.errors import UserError
from exnorm.data import index, noise
from exnorm.data.sets import cifar10
from exnorm.data.sets.webvision import query_labels

TINY = ("model=resnet18", "model.name=test_resnet", "logger=off", "ops.backend=eager", "batch=1x4", "trainer.epochs=1")


def one_line(path: Path, wnids: dict[str, str]) -> None:
    """`imagenet_2012_validation_synset_labels.txt`: a class on each line, in the order of the files."""
    path.write_text("\n".join(wnids.values()) + "\n")


def listed(path: Path, wnids: dict[str, str]) -> None:
    """A list as caffe's val.txt."""
    path.write_text("".join(f"{name} {WNIDS.index(wnid)}\n" for name, wnid in wnids.items()))


def kaggle(path: Path, wnids: dict[str, str]) -> None:
    """Kaggle's CSV, in an order of its own."""
    rows = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 " for name, wnid in reversed(wnids.items())]
    path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def devkit(path: Path, wnids: dict[str, str]) -> None:
    """The development kit: numbers from 1 in an order of its own, which only its meta.mat knows."""
    path.parent.mkdir(parents=True)
    ids = {WNIDS[1]: 1, WNIDS[2]: 2, WNIDS[0]: 3}
    path.write_text("".join(f"{ids[wnid]}\n" for wnid in wnids.values()))
    kind = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    savemat(path.with_name("meta.mat"), {"synsets": np.array([(i, w, "a, b") for w, i in ids.items()], kind)})


def test_imagenet_has_its_classes_in_sorted_order(tmp_path: Path) -> None:
    splits = data.load(config_of("imagenet", make_imagenet(tmp_path / "in")))
    assert splits.classes == sorted(WNIDS)
    assert (len(splits.train), len(splits.val)) == (18, 12)
    assert labelled_right(splits.train, WNIDS) and labelled_right(splits.val, WNIDS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("val.txt", listed),
        ("LOC_val_solution.csv", kaggle),
        ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", devkit),
        ("imagenet_2012_validation_synset_labels.txt", one_line),
    ],
)
def test_raw_validation_images_get_their_labels_from_any_file_that_goes_with_them(
    tmp_path: Path, name: str, write: Callable[[Path, dict[str, str]], None]
) -> None:
    root = make_imagenet(tmp_path / "in")
    write(root / name, flatten_val(root))
    assert labelled_right(data.load(config_of("imagenet", root)).val, WNIDS)
    (root / name).rename(tmp_path / "elsewhere.txt")
    if not name.startswith("ILSVRC"):
        again = config_of("imagenet", root, val_list=str(tmp_path / "elsewhere.txt"))
        assert labelled_right(data.load(again).val, WNIDS)


def test_raw_validation_images_without_labels_are_refused_with_the_files_that_would_do(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    names = flatten_val(root)
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv.*data\.val_list=FILE"):
        data.fingerprint(config_of("imagenet", root))
    one_line(root / "imagenet_2012_validation_synset_labels.txt", dict(list(names.items())[1:]))
    with pytest.raises(UserError, match="does not have one label for each of the 12 images"):
        data.fingerprint(config_of("imagenet", root))


def test_list_files_say_the_same_as_folders(tmp_path: Path) -> None:
    """As of SN's authors: the label's number, the class in the path; paths from the split's folder or the root."""
    root = make_imagenet(tmp_path / "in")
    folders = data.load(config_of("imagenet", root))
    for prefix in ("", "{split}/"):
        for split in ("train", "val"):
            lines = [
                f"{prefix.format(split=split)}{file.relative_to(root / split)} {WNIDS.index(file.parent.name)}\n"
                for file in sorted((root / split).glob("*/*"))
            ]
            (root / f"{split}_list.txt").write_text("".join(lines))
        lists = data.load(config_of("imagenet", root, train_list="train_list.txt", val_list="val_list.txt"))
        assert lists.classes == folders.classes
        assert list(lists.train.labels) == list(folders.train.labels)
        assert labelled_right(lists.train, WNIDS) and labelled_right(lists.val, WNIDS)


@pytest.mark.parametrize(("make", "source"), [(make_class_tars, "tar"), (make_shards, "wds")])
def test_tar_files_say_the_same_as_folders(tmp_path: Path, make: Callable[[Path, Path], Path], source: str) -> None:
    folders = make_imagenet(tmp_path / "in")
    splits = data.load(config_of("imagenet", make(tmp_path / "tars", folders), source=source))
    assert set(WNIDS) <= set(splits.classes) and (len(splits.train), len(splits.val)) == (18, 12)
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)


def test_numbers_that_could_be_any_class_are_refused(tmp_path: Path) -> None:
    """Shards of a part of ImageNet, whose numbers are places in the part."""
    shards = make_shards(tmp_path / "tars", make_imagenet(tmp_path / "in"), dict(zip(WNIDS, range(3), strict=True)))
    with pytest.raises(UserError, match="labels are numbers from 0 to 2. Numbers name .* WordNet ids"):
        data.load(config_of("imagenet", shards, source="wds"))
    assert data.load(config_of("imagefolder", shards, source="wds")).classes == ["0", "1", "2"]


def test_the_order_of_a_lists_numbers_is_not_that_of_the_classes(tmp_path: Path) -> None:
    """Classes are sorted by their WordNet ids whatever their numbers were."""
    root = make_imagenet(tmp_path / "in")
    for split in ("train", "val"):
        files = sorted((root / split).glob("*/*"))
        lines = [f"{file.relative_to(root)} {WEBVISION_ORDER.index(file.parent.name)}\n" for file in files]
        (root / f"{split}.txt").write_text("gone.JPEG 0\n" * (split == "val") + "".join(lines))
    splits = data.load(config_of("imagenet", root, train_list="train.txt", val_list="val.txt"))
    assert tuple(splits.classes) == WNIDS and labelled_right(splits.train, WNIDS)
    assert [WNIDS[label] for label in splits.val.labels[1:]] == [class_of(splits.val, place) for place in range(1, 13)]


@pytest.mark.parametrize("label", ["-1", "99999999999", "2.0", "1x"])
def test_a_number_that_is_no_label_is_named(tmp_path: Path, label: str) -> None:
    root = make_imagenet(tmp_path / "in")
    (root / "list.txt").write_text(f"a.JPEG 0\nb.JPEG {label}\n")
    with pytest.raises(UserError, match=f"list.txt: label {label}; labels are whole numbers from 0 on"):
        data.fingerprint(config_of("imagenet", root, val_list="list.txt"))


def test_class_folders_that_are_named_by_numbers_are_matched_by_name(tmp_path: Path) -> None:
    for split, names in (("train", ("0", "1", "10", "2")), ("val", ("2", "10"))):
        for name in names:
            save(tmp_path / "in" / split / name / "x.png", WNIDS[len(name) % 2])
    splits = data.load(config_of("imagefolder", tmp_path / "in"))
    assert [splits.classes[label] for label in splits.val.labels] == ["10", "2"]
    (tmp_path / "in" / "list.txt").write_text("2/x.png 2\n10/x.png 10\n")
    listed = data.load(config_of("imagefolder", tmp_path / "in", val_list="list.txt"))
    assert [listed.classes[label] for label in listed.val.labels] == ["2", "10"]


def test_numbers_beside_names_could_be_any_class_and_are_refused(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    for split, name_of in (("train", dict(zip(WNIDS, "zac", strict=True))), ("val", PLACES)):
        files = sorted((root / split).glob("*/*"))
        lines = [f"{file.relative_to(root)} {name_of[file.parent.name]}\n" for file in files]
        (root / f"{split}.txt").write_text("".join(lines))
    with pytest.raises(UserError, match="labels are names in train.txt and numbers in validation"):
        data.load(config_of("imagefolder", root, train_list="train.txt", val_list="val.txt"))


def test_numbers_that_count_from_one_are_refused(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    for split in ("train", "val"):
        files = sorted((root / split).glob("*/*"))
        lines = [f"{split}/{file.parent.name}/{file.name} {WNIDS.index(file.parent.name) + 1}\n" for file in files]
        (root / f"{split}.txt").write_text("".join(lines))
    config = config_of("imagefolder", root, train_list="train.txt", val_list="val.txt")
    with pytest.raises(UserError, match="train has no images of 0, the first class. "):
        data.load(config)


def test_webvisions_lists_may_name_their_classes(tmp_path: Path) -> None:
    root = make_webvision(tmp_path / "web")
    for file in (root / "info").glob("*filelist*"):
        pairs = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{name} {WEBVISION_ORDER[int(label)]}\n" for name, label in pairs))
    splits = data.load(config_of("webvision", root))
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)


def test_files_with_a_byte_order_mark_are_read_without_it(tmp_path: Path) -> None:
    """As editors on Windows write them, with their line ends."""
    root = make_webvision(tmp_path / "web")
    for file in (root / "info").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    splits = data.load(config_of("webvision", root))
    assert tuple(splits.classes) == WEBVISION_ORDER and labelled_right(splits.train, splits.classes)


def cut(tar: Path) -> None:
    """The first 60 % of a file."""
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 6 // 10])


def twice(tar: Path) -> None:
    """A tar file behind another, as `cat` leaves them."""
    tar.write_bytes(tar.read_bytes() * 2)


def without_a_label(tar: Path) -> None:
    """A shard in which the label of one image is missing."""
    with tarfile.open(tar) as old:
        members = [(info, old.extractfile(info)) for info in old]
        with tarfile.open(tar.with_suffix(".new"), "w") as new:
            for info, content in members[:-1]:
                new.addfile(info, content)
    tar.with_suffix(".new").replace(tar)


def zipped(tar: Path) -> None:
    """A compressed file."""
    tar.write_bytes(gzip.compress(tar.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (cut, "0000.tar is (cut off or damaged behind|no uncompressed tar file)"),
        (twice, "0000.tar is cut off or damaged behind 9 images"),
        (without_a_label, r"0000\.tar: n01440764_\d\.jpg has no label; others have one"),
        (zipped, "0000.tar is no uncompressed tar file"),
    ],
)
def test_damaged_tar_files_are_named(tmp_path: Path, damage: Callable[[Path], None], line: str) -> None:
    shards = make_shards(tmp_path / "tars", make_imagenet(tmp_path / "in"))
    damage(shards / "imagenet1k-train-0000.tar")
    with pytest.raises(UserError, match=line):
        data.load(config_of("imagenet", shards, source="tar"))


def test_the_class_in_a_tar_is_the_first_folder_that_differs(tmp_path: Path) -> None:
    folders = make_imagenet(tmp_path / "in")
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            for file in sorted((folders / split).glob("*/*")):
                tar.add(file, f"{split}/{file.parent.name}/images/{file.name}")
    splits = data.load(config_of("imagenet", tmp_path / "tars", source="tar"))
    assert tuple(splits.classes) == WNIDS and labelled_right(splits.train, WNIDS)


def test_folders_in_a_tar_that_are_named_by_numbers_are_names(tmp_path: Path) -> None:
    """Which need not begin with 0."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name, wnid in zip(("1", "10", "2"), WNIDS, strict=True):
                tar.add(save(tmp_path / "images" / f"{wnid}.png", wnid), f"{name}/{wnid}.png")
    splits = data.load(config_of("imagefolder", tmp_path, source="tar"))
    assert splits.classes == ["1", "10", "2"] and labelled_right(splits.val, WNIDS)


def test_two_links_to_one_folder_are_no_loop(tmp_path: Path) -> None:
    """Beside it, and from within a folder that is itself reached through a link."""
    root, pool = make_imagenet(tmp_path / "in", train=1), tmp_path / "pool"
    save(pool / "more" / "x.png", WNIDS[0])
    (pool / "also").symlink_to("more")
    for name in ("one", "two"):
        (root / "train" / WNIDS[0] / name).symlink_to(pool, target_is_directory=True)
    found = index.of_folders(root / "train")
    names = sorted(name.removeprefix(f"{WNIDS[0]}/") for name in found.names if name.endswith(".png"))
    assert names == [f"{link}/{inner}/x.png" for link in ("one", "two") for inner in ("also", "more")]


@pytest.mark.parametrize("target", ["in/train", "in/train/{}", "pool", "pool/more"])
def test_a_loop_behind_a_link_is_found(tmp_path: Path, target: str) -> None:
    """It ends at the system's limit of 40 links, so that each image would be there 40 times."""
    root, pool = make_imagenet(tmp_path / "in", train=1), tmp_path / "pool"
    save(pool / "more" / "x.png", WNIDS[0])
    (root / "train" / WNIDS[0] / "link").symlink_to(pool, target_is_directory=True)
    (pool / "more" / "back").symlink_to(tmp_path / target.format(WNIDS[0]), target_is_directory=True)
    with pytest.raises(UserError, match="back.* is a link to a folder that contains it. Remove the link"):
        index.of_folders(root / "train")


def test_folders_that_are_no_classes_are_named(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    (root / "train" / WNIDS[0] / "again").symlink_to(root / "train", target_is_directory=True)
    with pytest.raises(UserError, match="again is a link to a folder that contains it"):
        data.fingerprint(config_of("imagenet", root))
    (root / "train" / WNIDS[0] / "again").unlink()
    (root / "train" / WNIDS[0][:-1]).mkdir()  # a folder whose name begins as its neighbour's
    save(root / "train" / WNIDS[0][:-1] / "x.png", WNIDS[0])
    (root / "train" / WNIDS[0] / "beside").symlink_to(root / "train" / WNIDS[0][:-1], target_is_directory=True)
    (root / "train" / WNIDS[0] / "loop.jpg").symlink_to("loop.jpg")
    data.fingerprint(config_of("imagenet", root))
    (tmp_path / "deep").mkdir()
    for split in ("train", "val"):
        (tmp_path / "deep" / split).mkdir()
        (root / split).rename(tmp_path / "deep" / split / "images")
    with pytest.raises(UserError, match="has one class folder, images: expected"):
        data.fingerprint(config_of("imagenet", tmp_path / "deep"))


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("data.mean=[0,0]", r"data\.mean=\[0.*\]: give a number for each of red, green and blue"),
        ("data.std=[0,0,0]", r"data\.std="),
        ("data.scale=[1]", r"data\.scale=.*such as \[0\.08,1\]|as \[0\.08,1\]"),
        ("data.resize=8", r"data\.resize=8 is smaller than data\.image_size=32"),
        ("data.image_size=0", r"data\.image_size=0 is not possible"),
        ("data.max_bad_fraction=1", r"data\.max_bad_fraction=1"),
    ],
)
def test_crops_that_cannot_be_are_refused(option: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        data.fingerprint(config_of("digits", None, option))


def test_images_of_one_stem_in_a_tar_are_all_there_and_no_file_stays_open(tmp_path: Path) -> None:
    folders = make_imagenet(tmp_path / "in")
    for suffix in (".png", ".webp"):
        save(folders / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG", WNIDS[0]).rename(
            folders / "train" / WNIDS[0] / f"{WNIDS[0]}_0{suffix}"
        )
    save(folders / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG", WNIDS[0])
    splits = data.load(config_of("imagenet", make_class_tars(tmp_path / "tars", folders), source="tar"))
    assert len(splits.train) == 20
    for images in (splits.train, splits.val):
        images.open_image(0)  # maps the file of decoded images, once
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_else_lies_beside_raw_validation_images_is_no_image(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    one_line(root / "imagenet_2012_validation_synset_labels.txt", flatten_val(root))
    (root / "val" / "valprep.sh").write_text("mkdir -p n01440764")
    assert labelled_right(data.load(config_of("imagenet", root)).val, WNIDS)


def test_a_stream_is_refused_since_it_cannot_resume(tmp_path: Path) -> None:
    for source, line in (("tfds/imagenet2012", "is a stream"), ("zip", "data.source=zip: imagenet reads tar, wds")):
        with pytest.raises(UserError, match=line):
            data.fingerprint(config_of("imagenet", make_imagenet(tmp_path / source), source=source))


def test_classes_that_are_none_of_imagenets_are_sent_to_imagefolder(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    for split in ("train", "val"):
        (root / split / WNIDS[0]).rename(root / split / "goldfish")
    with pytest.raises(UserError, match=r"such as goldfish\. .* data=imagefolder"):
        data.load(config_of("imagenet", root))
    assert data.load(config_of("imagefolder", root)).classes == ["goldfish", *WNIDS[1:]]


def test_validation_alone_needs_no_training_images(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="no folder train"):
        data.fingerprint(config_of("imagenet", root))
    first = data.fingerprint(config_of("imagenet", root), train=False)
    (root / "train" / "half_unpacked").mkdir(parents=True)
    assert data.fingerprint(config_of("imagenet", root), train=False) == first
    splits = data.load(config_of("imagenet", root), train=False)
    assert len(splits.train) == 0 and labelled_right(splits.val, splits.classes)


@pytest.mark.parametrize(("origin", "count"), [("google", 16), ("flickr", 16), ("all", 32)])
def test_webvision_is_labelled_by_its_lists_in_the_order_of_its_synsets(
    tmp_path: Path, origin: str, count: int
) -> None:
    splits = data.load(config_of("webvision", make_webvision(tmp_path / "web"), origin=origin))
    assert tuple(splits.classes) == WEBVISION_ORDER
    assert (len(splits.train), len(splits.val)) == (count, 9)
    assert labelled_right(splits.train, WEBVISION_ORDER) and labelled_right(splits.val, WEBVISION_ORDER)


def test_the_queries_of_webvision_count_classes_from_one(tmp_path: Path) -> None:
    """The label of each listed image is that of its query's folder."""
    root = make_webvision(tmp_path / "web")
    labels = query_labels(root)
    lines = (root / "info" / "train_filelist_all.txt").read_text().split("\n")[:-1]
    assert all(labels[line.split("/")[1]] == int(line.split()[1]) for line in lines)


def test_mini_webvision_is_google_and_the_first_classes(tmp_path: Path) -> None:
    root = make_webvision(tmp_path / "web")
    splits = data.load(config_of("mini_webvision", root, num_classes=2))
    assert tuple(splits.classes) == WEBVISION_ORDER[:2]
    assert (len(splits.train), len(splits.val)) == (3 * 4, 2 * 3)
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("val_filelist.txt", "val000000.jpg 3\n"), "val000000.jpg has label 3. .* labels go from 0 to 2"),
        (("val_filelist.txt", "val000000.jpg\n"), "line 1: expected 'path label', found 'val000000.jpg'"),
        (("val_filelist.txt", ""), "val_filelist.txt is empty"),
        (("synsets.txt", "n01440764 a\nn01440764 b\n"), "has n01440764 twice"),
        (("synsets.txt", None), "there is no info/synsets.txt; expected DIR/info"),
    ],
)
def test_info_files_that_cannot_be_are_named(tmp_path: Path, change: tuple[str, str | None], line: str) -> None:
    root = make_webvision(tmp_path / "web")
    name, text = change
    (root / "info" / name).unlink()
    if text is not None:
        (root / "info" / name).write_text(text)
    with pytest.raises(UserError, match=line):
        data.load(config_of("webvision", root))


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_number_of_classes_that_cannot_be_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"data.num_classes={count}: allowed: 1 to 3"):
        data.fingerprint(config_of("webvision", make_webvision(tmp_path / "web"), num_classes=count))


def test_a_further_set_without_a_folder_is_named(tmp_path: Path) -> None:
    make_webvision(tmp_path / "webvision")
    with pytest.raises(
        UserError, match=r"data\.val=.* names imagenet: data=imagenet needs a folder. Type data\.roots="
    ):
        data.fingerprint(config_of("mini_webvision", tmp_path / "webvision", num_classes=2))


def test_what_timm_reads_from_the_hub_is_read_by_its_own_names(tmp_path: Path) -> None:
    """With the package `datasets`, which is none of ours: a folder as a set of the hub."""
    pytest.importorskip("datasets")
    root = make_imagenet(tmp_path / "hub")
    (root / "val").rename(root / "validation")
    (tmp_path / "bad.txt").write_text("validation/1\n")
    config = config_of("imagenet", tmp_path / "cache", source=f"hfds/{root}", exclude=str(tmp_path / "bad.txt"))
    splits = data.load(config)
    assert (len(splits.train), len(splits.val), splits.val.excluded) == (18, 11, 1)
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)


def test_several_sets_validate_over_the_classes_of_the_run(tmp_path: Path) -> None:
    """mini-WebVision's own images and ImageNet's of the same classes, each with the run's label."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    config = config_of("mini_webvision", roots=str(tmp_path), num_classes=2)
    assert data.fingerprint(config) != data.fingerprint(
        config_of("mini_webvision", roots=str(tmp_path), num_classes=2, val=None)
    )
    splits = data.load(config)
    sets = data.validation_sets(config, splits)
    assert {name: (len(images), images.of_other_classes) for name, images in sets.items()} == {
        "mini_webvision": (6, 0),
        "imagenet": (8, 4),
    }
    assert all(labelled_right(images, splits.classes) for images in sets.values())


def test_the_folder_of_a_set_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_imagenet(tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"data\.roots=DIR .*EXNORM_DATA=DIR.* data\.root=DIR"):
        data.fingerprint(config_of("imagenet"))
    monkeypatch.setenv("EXNORM_DATA", str(tmp_path))
    assert len(data.load(config_of("imagenet")).val) == 12


def test_excluded_images_are_left_out_counted_and_change_the_fingerprint(tmp_path: Path) -> None:
    """However their paths are written."""
    root = make_imagenet(tmp_path / "in")
    val, train = (f"val/{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG", f"train/{WNIDS[1]}/{WNIDS[1]}_0.JPEG")
    (tmp_path / "bad.txt").write_text(f"# two\n\n{root / val}\n./{train}\r\n")
    config = config_of("imagenet", root, exclude=str(tmp_path / "bad.txt"))
    assert data.fingerprint(config) != data.fingerprint(config_of("imagenet", root))
    splits = data.load(config)
    assert (splits.train.excluded, splits.val.excluded) == (1, 1)
    assert (len(splits.train), len(splits.val)) == (17, 11)
    assert labelled_right(splits.train, WNIDS) and labelled_right(splits.val, WNIDS)
    (tmp_path / "bad.txt").write_text(f"{val}\nval/gone.JPEG\n")
    with pytest.raises(UserError, match=r"val/gone\.JPEG is not an image in .* \(of 1 such lines\)"):
        data.fingerprint(config)
    (tmp_path / "bad.txt").write_text("".join(f"{file.relative_to(root)}\n" for file in (root / "val").glob("*/*")))
    with pytest.raises(UserError, match="leaves no images for val"):
        data.fingerprint(config)
    with pytest.raises(UserError, match=r"data\.exclude=nowhere\.txt: there is no such file"):
        data.load(config_of("imagenet", root, exclude="nowhere.txt"))


def test_images_are_excluded_from_every_set_of_a_run_and_from_tar_files(tmp_path: Path) -> None:
    """A line says which set it is of by its path; those of one set are nothing in another."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    lines = (f"val/{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG", "google/q0001/0.jpg", "google/q0002/0.jpg")
    (tmp_path / "bad.txt").write_text("\n".join(lines))
    config = config_of("mini_webvision", roots=str(tmp_path), num_classes=2, exclude=str(tmp_path / "bad.txt"))
    data.fingerprint(config)
    splits = data.load(config)
    sets = data.validation_sets(config, splits)
    assert (splits.train.excluded, sets["mini_webvision"].excluded, sets["imagenet"].excluded) == (2, 0, 1)
    tars = make_class_tars(tmp_path / "tars", tmp_path / "imagenet")
    (tmp_path / "bad.txt").write_text(f"val/{WNIDS[0]}.tar/ILSVRC2012_val_00000001.JPEG")
    config = config_of("imagenet", tars, source="tar", exclude=str(tmp_path / "bad.txt"))
    data.fingerprint(config)
    assert data.load(config).val.excluded == 1


def aged(root: Path) -> Path:
    """The folders and files as if they had not changed for an hour."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (path.stat().st_atime - 3600, path.stat().st_mtime - 3600))
    return root


def test_a_scan_is_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = aged(make_imagenet(tmp_path / "in"))
    config, first = config_of("imagenet", root), data.fingerprint(config_of("imagenet", root))
    with monkeypatch.context() as patched:
        patched.setattr(index, "_scan_folders", None)  # nothing is scanned again
        assert data.fingerprint(config) == first
        assert labelled_right(data.load(config).val, WNIDS)
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").rename(root / "train" / WNIDS[0] / "other.JPEG")
    renamed = data.fingerprint(config)
    assert renamed != first
    save(root / "train" / WNIDS[2] / "new.JPEG", WNIDS[2])
    assert data.fingerprint(config) not in (first, renamed)
    assert len(data.load(config).train) == 19


def test_files_that_are_written_anew_under_their_names_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a copy of a set in another size, which leaves the folders as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = aged(make_imagenet(tmp_path / "in"))
    first = data.fingerprint(config_of("imagenet", root))
    for file in (root / "train").glob("*/*"):
        save(file, file.parent.name, size=(60, 50))
    assert data.fingerprint(config_of("imagenet", root)) != first


def test_a_damaged_index_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = aged(make_imagenet(tmp_path / "in"))
    first = data.fingerprint(config_of("imagenet", root))
    files = list((tmp_path / "cache" / "exnorm").glob("index-*.npz"))
    assert len(files) == 2
    for damage in (b"", b"PK\x03\x04 nothing", files[0].read_bytes()[:-100]):
        for file in files:
            file.write_bytes(damage)
        assert data.fingerprint(config_of("imagenet", root)) == first


def test_a_folder_that_has_just_changed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change could have the same time stamp as the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.fingerprint(config_of("imagenet", make_imagenet(tmp_path / "in")))
    assert not list((tmp_path / "cache").rglob("index-*.npz"))


def test_cifar10_is_read_by_torchvision_and_noise_makes_its_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_cifar10(tmp_path / "cifar")
    accept_cifar10(root, monkeypatch)
    overrides = ("data.noise.kind=asymmetric", "data.noise.rate=1.0")
    config = config_of("cifar10", root, *overrides)
    data.fingerprint(config)
    splits = data.load(config)
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (200, 40, 10)
    assert all(splits.val.open_image(i).getpixel((0, 0)) == (10 * splits.val.labels[i], 0, 0) for i in range(40))
    pairs = {(before, after) for _, before, after in noise.wrong_labels(splits.train)}
    assert pairs == {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}
    assert [label for label in range(10) if cifar10.MISTAKEN_FOR[label] == label] == [0, 1, 6, 7, 8]
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="finds the files of CIFAR10 corrupted"):
        data.load(config)


def accuracies(run: Path) -> dict[str, float]:
    """The record's top-1 of each set."""
    record = json.loads((run / "record.json").read_text())
    return {key: value for key, value in record.items() if key.startswith("val/") and key.endswith("top1")}


@pytest.mark.slow
def test_webvision_and_imagenet_transfer_in_both_directions(tmp_path: Path, cli_here: CliRunner) -> None:
    """Trained on each for an epoch, validated on both meanwhile, evaluated on the other afterwards."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    roots = f"data.roots={tmp_path}"
    for own, other, images in (("webvision", "imagenet", 12), ("imagenet", "webvision", 9)):
        cwd = tmp_path / f"from_{own}"
        arguments = ["train", f"data={own}", roots, f"data.val=[{own},{other}]", *SMALL, *TINY, "norm=bn"]
        run = train_here(arguments, cwd)
        assert set(accuracies(run)) == {"val/top1", f"val/{own}/top1", f"val/{other}/top1"}
        done = cli_here("eval", run, f"data={other}", roots, *SMALL, cwd=cwd)
        assert done.returncode == 0, done.stderr
        row = json.loads((run / "evaluations.jsonl").read_text())
        assert (row["data"], row["images"], row["images_of_other_classes"]) == (other, images, 0)
        assert row["val/top1"] == accuracies(run)[f"val/{other}/top1"]


@pytest.mark.slow
def test_a_mini_model_is_tested_on_the_classes_of_the_full_sets(tmp_path: Path, cli_here: CliRunner) -> None:
    """Without arguments on the sets of its own configuration, a row for each."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    mini = ["train", "data=mini_webvision", f"data.roots={tmp_path}", "data.num_classes=2", *SMALL, *TINY, "norm=sn"]
    run = train_here(mini, tmp_path / "mini")
    done = cli_here("eval", run, cwd=tmp_path / "mini")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    found = [(row["data"], row["images"], row["images_of_other_classes"]) for row in rows]
    assert found == [("mini_webvision", 6, 0), ("imagenet", 8, 4)]
    assert [row["val/top1"] for row in rows] == [accuracies(run)[f"val/{name}/top1"] for name, _, _ in found]


@pytest.mark.slow
def test_excluded_images_are_in_the_record(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    (tmp_path / "bad.txt").write_text(
        f"val/{WNIDS[0]}/{sorted(file.name for file in (root / 'val' / WNIDS[0]).iterdir())[0]}\n"
    )
    (tmp_path / "cwd").mkdir()
    train_here(
        ["train", "data=imagenet", f"data.root={root}", f"data.exclude={tmp_path / 'bad.txt'}", *SMALL, *TINY],
        tmp_path / "cwd",
    )
    record = json.loads((only_run(tmp_path / "cwd") / "record.json").read_text())
    assert record["excluded_images"] == {"train": 0, "val/imagenet": 1}
    assert (record["train_images"], record["val_images"]) == (18, {"imagenet": 11})


def test_a_colour_tells_the_class(tmp_path: Path) -> None:
    """The tests above could not see a wrong label otherwise."""
    splits = data.load(config_of("imagenet", make_imagenet(tmp_path / "in")))
    assert {class_of(splits.train, i) for i in range(len(splits.train))} == set(WNIDS)
    assert not labelled_right(splits.train, WEBVISION_ORDER)
