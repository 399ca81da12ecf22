"""The layouts of ImageNet, WebVision and CIFAR: each image with its own class, in the classes' own order."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import CliRunner
from data_cases import (
    SMALL,
    WEBVISION_ORDER,
    WNIDS,
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
from engine_cases import only_run, train
from scipy.io import savemat

from exnorm import data
from exnorm.config.errors import UserError
from exnorm.data import cifar10, index, noise
from exnorm.data.webvision import query_labels

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
    with pytest.raises(UserError, match="does not label the 12 files"):
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
    # A number in a shard is a place among all thousand classes, of which the first three are these.
    assert tuple(splits.classes[:3]) == WNIDS and (len(splits.train), len(splits.val)) == (18, 12)
    assert labelled_right(splits.train, splits.classes) and labelled_right(splits.val, splits.classes)


def test_a_stream_is_refused_since_it_cannot_resume(tmp_path: Path) -> None:
    for source, line in (("tfds/imagenet2012", "is a stream"), ("zip", "data.source=zip: imagenet reads tar, wds")):
        with pytest.raises(UserError, match=line):
            data.fingerprint(config_of("imagenet", make_imagenet(tmp_path / source), source=source))


def test_classes_that_are_none_of_imagenets_are_sent_to_imagefolder(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    for split in ("train", "val"):
        (root / split / WNIDS[0]).rename(root / split / "goldfish")
    with pytest.raises(UserError, match=r"such as goldfish; .* data=imagefolder"):
        data.load(config_of("imagenet", root))
    assert data.load(config_of("imagefolder", root)).classes == ["goldfish", *WNIDS[1:]]


def test_validation_alone_needs_no_training_images(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="no folder train"):
        data.fingerprint(config_of("imagenet", root))
    data.fingerprint(config_of("imagenet", root), train=False)
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
        (("val_filelist.txt", "val000000.jpg 3\n"), "label 3 of val000000.jpg, .* labels go from 0 to 2"),
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


def test_several_sets_validate_over_the_classes_of_the_run(tmp_path: Path) -> None:
    """mini-WebVision's own images and ImageNet's of the same classes, each with the run's label."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    config = config_of("mini_webvision", roots=str(tmp_path), num_classes=2)
    assert data.fingerprint(config) != data.fingerprint(config_of("mini_webvision", roots=str(tmp_path), val=None))
    splits = data.load(config)
    sets = data.validation_sets(config, splits)
    assert {name: (len(images), images.of_other_classes) for name, images in sets.items()} == {
        "mini_webvision": (6, 0),
        "imagenet": (8, 4),
    }
    assert all(labelled_right(images, splits.classes) for images in sets.values())


def test_the_folder_of_a_set_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_imagenet(tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"data\.root=DIR, or data\.roots=DIR .*EXNORM_DATA=DIR"):
        data.fingerprint(config_of("imagenet"))
    monkeypatch.setenv("EXNORM_DATA", str(tmp_path))
    assert len(data.load(config_of("imagenet")).val) == 12


def test_excluded_images_are_left_out_counted_and_change_the_fingerprint(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    victims = [next((root / "val" / WNIDS[0]).iterdir()), root / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG"]
    (tmp_path / "bad.txt").write_text(f"# two\n\n{victims[0]}\n{victims[1].relative_to(root)}\n")
    config = config_of("imagenet", root, exclude=str(tmp_path / "bad.txt"))
    splits = data.load(config)
    assert (splits.train.excluded, splits.val.excluded) == (1, 1)
    assert (len(splits.train), len(splits.val)) == (17, 11)
    assert labelled_right(splits.train, WNIDS) and labelled_right(splits.val, WNIDS)
    assert data.fingerprint(config) != data.fingerprint(config_of("imagenet", root))
    with pytest.raises(UserError, match=r"data\.exclude=nowhere\.txt: there is no such file"):
        data.load(config_of("imagenet", root, exclude="nowhere.txt"))


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
    files = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in (root / "cifar-10-batches-py").iterdir()}
    cifar = torchvision.datasets.CIFAR10  # checks the files' hashes
    monkeypatch.setattr(cifar, "train_list", [[name, files[name]] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, files[name]] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": files["batches.meta"]})
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
    with pytest.raises(UserError, match="corrupted"):
        data.load(config)


def accuracies(run: Path) -> dict[str, float]:
    """The record's top-1 of each set."""
    record = json.loads((run / "record.json").read_text())
    return {key: value for key, value in record.items() if key.startswith("val/") and key.endswith("top1")}


@pytest.mark.slow
def test_webvision_and_imagenet_transfer_in_both_directions(tmp_path: Path, run_cli: CliRunner) -> None:
    """Trained on each for an epoch, validated on both meanwhile, evaluated on the other afterwards."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    roots = f"data.roots={tmp_path}"
    for own, other, images in (("webvision", "imagenet", 12), ("imagenet", "webvision", 9)):
        cwd = tmp_path / f"from_{own}"
        arguments = ["train", f"data={own}", roots, f"data.val=[{own},{other}]", *SMALL, *TINY, "norm=bn"]
        run = train(arguments, cwd)
        assert set(accuracies(run)) == {"val/top1", f"val/{own}/top1", f"val/{other}/top1"}
        done = run_cli("eval", run, f"data={other}", roots, *SMALL, cwd=cwd)
        assert done.returncode == 0, done.stderr
        row = json.loads((run / "evaluations.jsonl").read_text())
        assert (row["data"], row["images"], row["images_of_other_classes"]) == (other, images, 0)
        assert row["val/top1"] == accuracies(run)[f"val/{other}/top1"]
        again = run_cli("eval", run, cwd=cwd)  # the sets of the run itself
        assert again.returncode == 0, again.stderr
        assert [json.loads(line)["data"] for line in (run / "evaluations.jsonl").read_text().splitlines()[1:]] == [
            own,
            other,
        ]


@pytest.mark.slow
def test_a_mini_model_is_tested_on_the_classes_of_the_full_sets(tmp_path: Path, run_cli: CliRunner) -> None:
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    mini = ["train", "data=mini_webvision", f"data.roots={tmp_path}", "data.num_classes=2", *SMALL, *TINY, "norm=sn"]
    run = train(mini, tmp_path / "mini")
    for name, images, others in (("imagenet", 8, 4), ("webvision", 6, 3)):
        done = run_cli("eval", run, f"data={name}", f"data.roots={tmp_path}", *SMALL, cwd=tmp_path / "mini")
        assert done.returncode == 0, done.stderr
        row = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
        assert (row["images"], row["images_of_other_classes"]) == (images, others)
    full = ["train", "data=imagenet", f"data.roots={tmp_path}", *SMALL, *TINY, "norm=bn"]
    done = run_cli("eval", train(full, tmp_path / "full"), "data=mini_webvision", "data.num_classes=2", *SMALL,
                   f"data.roots={tmp_path}", cwd=tmp_path / "full")  # fmt: skip
    assert done.returncode == 2
    assert "data=mini_webvision has 2 classes, and 1 of the run's 3 are not among them" in done.stderr


@pytest.mark.slow
def test_excluded_images_are_in_the_record(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "in")
    (root / "bad.txt").write_text(
        f"val/{WNIDS[0]}/{sorted(file.name for file in (root / 'val' / WNIDS[0]).iterdir())[0]}\n"
    )
    (tmp_path / "cwd").mkdir()
    train(["train", "data=imagenet", f"data.root={root}", "data.exclude=bad.txt", *SMALL, *TINY], tmp_path / "cwd")
    record = json.loads((only_run(tmp_path / "cwd") / "record.json").read_text())
    assert record["excluded_images"] == {"train": 0, "val/imagenet": 1}
    assert (record["train_images"], record["val_images"]) == (18, {"imagenet": 11})


def test_a_colour_tells_the_class(tmp_path: Path) -> None:
    """The tests above could not see a wrong label otherwise."""
    splits = data.load(config_of("imagenet", make_imagenet(tmp_path / "in")))
    assert {class_of(splits.train, i) for i in range(len(splits.train))} == set(WNIDS)
    assert not labelled_right(splits.train, WEBVISION_ORDER)
