"""Files that change after a run was named after them: one line, and never a training under the wrong name."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from data_cases import config_of
from engine_cases import assert_same_run, make_image_folder, metrics, only_run, tiny, train_here, working_here
from mask_cases import make_segfolder
from omegaconf import OmegaConf

from exnorm import data
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import files, index
from exnorm.engine import launch
from exnorm.engine import train as engine
from exnorm.engine.learner import save

MANY = 400  # images of a class, so that a sample of the sizes misses one of them


def longer(path: Path) -> None:
    """The file with one more byte, which no decoder notices."""
    path.write_bytes(path.read_bytes() + b"\0")


def rewritten(path: Path) -> None:
    """The file is written again. Its size stays; whether its content does, only a hash of the content would tell."""
    path.write_bytes(path.read_bytes())


def age(root: Path) -> None:
    """All files and folders get a time long ago. Times of just now say nothing about a later change."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1, 1))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without an earlier scan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (longer, r"it had \d+ bytes and has \d+ now"),
        (rewritten, "its modification time is not that in the list of files"),
        (Path.unlink, "it is gone"),
    ],
)
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_file_that_changes_after_the_scan_is_named(
    tmp_path: Path, own_cache: Path, kind: str, change: Callable[[Path], None], line: str
) -> None:
    if kind == "images":
        root = make_image_folder(tmp_path / "in", train=2, val=1)
        config, victim = config_of("imagefolder", root, "data.cache=false"), root / "train" / "cat" / "1.png"
    else:
        root = make_segfolder(tmp_path / "in")
        config = OmegaConf.merge(config_of("segfolder", root), {"num_classes": 3})
        victim = root / "train" / "masks" / "drive 0" / "0.png"
    age(root)
    images: Any = data.load(config).train

    def open_all() -> None:
        for place in range(len(images)):
            images.open(place)

    open_all()
    before = data.fingerprint(config)
    change(victim)
    with pytest.raises(UserError, match=rf"{victim} has changed: {line}\. Type the same command again"):
        open_all()
    if change is longer:
        assert data.fingerprint(config) != before


@pytest.mark.parametrize("change", [longer, rewritten])
def test_a_kept_scan_whose_sample_misses_a_change_is_made_anew_after_the_error(
    tmp_path: Path, own_cache: Path, change: Callable[[Path], None]
) -> None:
    """Otherwise each start would find the same file changed."""
    root = tmp_path / "in"
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
    victim = root / "train" / "cat" / "0001.png"
    first = make_image_folder(tmp_path / "some", train=1, val=1) / "train" / "cat" / "0.jpg"
    for path in [root / "val" / "cat" / "0.png", root / "val" / "dog" / "0.png"]:
        path.write_bytes(first.read_bytes())
    for name in ("cat", "dog"):
        for number in range(MANY):
            (root / "train" / name / f"{number:04}.png").write_bytes(first.read_bytes())
    age(root)
    config = OmegaConf.merge(config_of("imagefolder", root), {"cache": False})
    before = data.fingerprint(config)
    change(victim)
    assert data.fingerprint(config) == before  # the sample misses it
    with pytest.raises(UserError, match="has changed"):
        data.load(config).train.open(1)
    assert (data.fingerprint(config) == before) is (change is rewritten)
    data.load(config).train.open(1)


def test_files_that_were_copied_again_are_the_same_data(tmp_path: Path, own_cache: Path) -> None:
    """With other times, which a sample notices; no start ends for that."""
    root = make_image_folder(tmp_path / "in", train=2, val=1)
    age(root)
    config = config_of("imagefolder", root, "data.cache=false")
    before = data.fingerprint(config)
    for path in root.rglob("*.*"):
        os.utime(path, (2, 2))
    assert data.fingerprint(config) == before
    for place in range(6):
        data.load(config).train.open(place)


@pytest.mark.parametrize("seconds", [-5, 1 << 34])
def test_strange_times_are_compared_by_sizes_and_the_scan_is_kept(
    seconds: int, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1970, and beyond what 64 bits of nanoseconds hold."""
    root = make_image_folder(tmp_path / "in", train=2, val=1)
    age(root)
    for path in root.rglob("*.*"):
        os.utime(path, (seconds, seconds))
    config = config_of("imagefolder", root, "data.cache=false")
    before = data.fingerprint(config)
    scans = mock.Mock(side_effect=AssertionError("scanned again"))
    monkeypatch.setattr(index, "_scan_folders", scans)
    assert data.fingerprint(config) == before
    data.load(config).train.open(1)


def test_a_file_that_was_written_just_before_the_scan_is_compared_by_its_size(tmp_path: Path, own_cache: Path) -> None:
    """Its time may be that of a file system whose files always seem new, or whose clock is ahead."""
    root = make_image_folder(tmp_path / "in", train=2, val=1)
    ahead = time.time() + 3600
    for path in root.rglob("*.*"):
        os.utime(path, (ahead, ahead))
    images: Any = data.load(config_of("imagefolder", root, "data.cache=false")).train
    victim = root / "train" / "cat" / "1.png"
    os.utime(victim)
    images.open(1)
    longer(victim)
    with pytest.raises(UserError, match="bytes"):
        images.open(1)


def changing(path: Path) -> Any:
    """The file changes after the controller has named the run, and before its worker opens the data."""
    work = launch.run_workers

    def changes_first(*arguments: Any, **options: Any) -> None:
        longer(path)
        work(*arguments, **options)

    return mock.patch.object(launch, "run_workers", changes_first)


def test_images_that_change_before_the_worker_reads_them_end_the_run(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that has begun, which then goes on with the earlier images."""
    root = make_image_folder(tmp_path / "in")
    arguments = tiny(root, "data.cache=false")
    whole = train_here(arguments, tmp_path / "whole")
    victim = root / "train" / "dog" / "3.png"
    content = victim.read_bytes()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = compose_train(arguments[1:])
    with working_here(), changing(victim), pytest.raises(UserError, match=r"data=imagefolder have changed .* the same"):
        launch.run(config)
    assert not list(here.glob("runs/*/*"))
    victim.write_bytes(content)
    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.chdir(begun)
    with working_here(), mock.patch.object(engine, "save", stop_after_saving()), pytest.raises(KeyboardInterrupt):
        launch.run(config)
    with working_here(), changing(victim), pytest.raises(UserError, match="have changed"):
        launch.run(config)
    rows = len(metrics(only_run(begun)))
    assert rows
    victim.write_bytes(content)
    with working_here():
        launch.run(config)
    assert_same_run(only_run(begun), whole)
    assert json.loads((only_run(begun) / "provenance.json").read_text())["resumed"]


def stop_after_saving() -> Any:
    """Ctrl-C just after the first checkpoint."""

    def saving(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    return saving


def test_a_file_that_changes_while_it_is_read_has_changed_and_is_not_broken(tmp_path: Path, own_cache: Path) -> None:
    root = make_image_folder(tmp_path / "in", train=2, val=1)
    age(root)
    victim = root / "train" / "cat" / "1.png"
    images: Any = data.load(config_of("imagefolder", root, "data.cache=false")).train
    opened = files._file

    def cut_then_read(entries: Any, index: int) -> Any:
        stream = opened(entries, index)
        victim.write_bytes(victim.read_bytes()[:100])
        return stream

    with mock.patch.object(files, "_file", cut_then_read), pytest.raises(UserError, match=f"{victim} has changed"):
        images.open(1)


def test_an_image_that_is_good_again_does_not_end_an_evaluation(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation with batch averages reads training images, and lists those that are broken."""
    run = train_here(tiny(make_image_folder(tmp_path / "in"), "trainer.epochs=1", "norm=bn"), tmp_path)
    listed = run / "bad_images.csv"
    listed.write_text("data,index,path,reason\nimagefolder,1,train/cat/1.png,image file is truncated\n")
    monkeypatch.chdir(tmp_path)
    with working_here():
        launch.evaluate_run(run, ["data.workers=0", "inference=batch_average", "calibration_batches=2"])
    assert (run / "evaluations.jsonl").read_text().count("\n") == 1
    assert listed.read_text() == "data,index,path,reason\n"


def test_images_that_change_before_an_evaluation_reads_them_end_it(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_image_folder(tmp_path / "in")
    run = train_here(tiny(root, "trainer.epochs=1"), tmp_path)
    monkeypatch.chdir(tmp_path)
    with working_here(), changing(root / "val" / "dog" / "3.png"), pytest.raises(UserError, match="have changed"):
        launch.evaluate_run(run, ["data.workers=0"])
    assert not (run / "evaluations.jsonl").exists()
