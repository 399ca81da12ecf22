"""`exnorm doctor data=NAME`: what it says of a set, what it fails on, and the sheet that a person looks at."""

import re
from pathlib import Path

import numpy as np
import pytest
from data_cases import COLOURS, SMALL, WNIDS, make_imagenet, make_webvision
from PIL import Image

from exnorm.diagnostics.doctor_data import CAPTION, COLUMNS, ROWS, TILE, run


def look(capsys: pytest.CaptureFixture[str], sheet: Path, *overrides: str) -> tuple[int, str]:
    """The exit code and what was printed."""
    code = run([*overrides, *SMALL], 0, sheet)
    return code, capsys.readouterr().out


def test_a_good_set_passes_with_its_counts_sizes_and_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_imagenet(tmp_path / "in", train=12)
    code, text = look(capsys, tmp_path / "sheet.png", "data=imagenet", f"data.root={root}")
    assert code == 0
    assert "train: 36 images in 3 classes, 12 to 12 each (median 12)" in text
    assert "val (imagenet): 12 images in 3 classes, 4 to 4 each" in text
    assert "width x height from 24 x 20 over 24 x 20 to 24 x 20" in text
    pixels = np.array(list(COLOURS.values())) / 255  # three plain colours, equally often
    mean, std = pixels.mean(0), pixels.std(0)
    line = next(line for line in text.splitlines() if line.startswith("  mean"))
    found = [float(word) for word in re.sub(r"[(),;]", " ", line).split() if word[0].isdigit()]
    assert np.allclose(found[:3], mean, atol=0.02) and np.allclose(found[6:9], std, atol=0.02)
    assert line.endswith("far from each other")
    assert "images of 32 px per second" in text


def test_the_sheet_shows_training_images_of_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_imagenet(tmp_path / "in", train=16)
    look(capsys, tmp_path / "sheet.png", "data=imagenet", f"data.root={root}")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (COLUMNS * (TILE + 4), ROWS * (TILE + CAPTION + 4))
    pixels = np.asarray(sheet).astype(int)
    found = [pixels[row * (TILE + CAPTION + 4) + TILE // 2, TILE // 2] for row in range(ROWS)]
    wanted = [COLOURS[wnid] for wnid in WNIDS for _ in range(2)]  # 48 images in order, 8 in a row
    assert np.abs(np.array(found) - wanted).max() < 12


def test_broken_images_are_named_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_imagenet(tmp_path / "in", train=16)
    broken = root / "train" / WNIDS[0] / f"{WNIDS[0]}_2.JPEG"
    broken.write_text("<html>")
    arguments = ("data=imagenet", f"data.root={root}")
    code, text = look(capsys, tmp_path / "sheet.png", *arguments)
    assert code == 1 and f"broken: {broken.relative_to(root)} (the image format is not known" in text
    assert "FAIL: 2.08 % of the training images are broken" in text
    assert look(capsys, tmp_path / "sheet.png", *arguments, "data.max_bad_fraction=0.05")[0] == 0
    victim = sorted((root / "val" / WNIDS[0]).iterdir())[0]
    victim.write_bytes(b"")
    code, text = look(capsys, tmp_path / "sheet.png", *arguments, "data.max_bad_fraction=0.05")
    assert code == 1 and "FAIL: broken validation images" in text and f"broken: {victim.relative_to(root)}" in text


def test_all_broken_files_are_in_a_list_that_the_next_command_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those found later are added to those left out already; the reason stands above each."""
    root = make_imagenet(tmp_path / "in", train=16)
    broken = [root / "train" / WNIDS[0] / f"{WNIDS[0]}_{number}.JPEG" for number in range(7)]
    broken.append(sorted((root / "val" / WNIDS[1]).iterdir())[0])
    for file in broken:
        file.write_text("<html>")
    arguments, listing = ("data=imagenet", f"data.root={root}"), tmp_path / "imagenet-broken.txt"
    code, text = look(capsys, tmp_path / "sheet.png", *arguments)
    assert code == 1 and f"broken images: all 8 are listed in {listing}; data.exclude={listing} leaves" in text
    assert text.count("  broken: ") == 6 and "  and 2 more" in text
    lines = listing.read_text().splitlines()
    assert lines[::2] == ["# the image format is not known"] * 8
    assert lines[1::2] == [str(file.relative_to(root)) for file in broken]
    code, text = look(capsys, tmp_path / "sheet.png", *arguments, f"data.exclude={listing}")
    assert code == 0 and "broken:" not in text and "7 excluded" in text and "1 excluded" in text
    late = root / "train" / WNIDS[2] / f"{WNIDS[2]}_3.JPEG"
    late.write_text("<html>")
    assert look(capsys, tmp_path / "sheet.png", *arguments, f"data.exclude={listing}")[0] == 1
    code, text = look(capsys, tmp_path / "sheet.png", *arguments, f"data.exclude={listing}")
    assert code == 0 and "8 excluded" in text


def test_a_look_at_a_part_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_imagenet(tmp_path / "in", train=16)
    assert run(["data=imagenet", f"data.root={root}", *SMALL], 10, tmp_path / "sheet.png") == 0
    assert "train: 10 of 10 opened images are good (of 48; --images 0 opens all)" in capsys.readouterr().out


def test_labels_that_disagree_with_webvisions_queries_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And label noise, and a further set's images of other classes."""
    make_webvision(tmp_path / "webvision"), make_imagenet(tmp_path / "imagenet")
    arguments = ("data=mini_webvision", f"data.roots={tmp_path}", "data.num_classes=2")
    code, text = look(capsys, tmp_path / "sheet.png", *arguments)
    assert code == 0 and "queries: 0 of 12 labels differ" in text
    assert "val (imagenet): 8 images in 2 classes, 4 to 4 each (median 4); 4 of other classes left out" in text
    names = tmp_path / "webvision" / "info" / "train_filelist_google.txt"
    names.write_text(names.read_text().replace("google/q0001/0.jpg 0", "google/q0001/0.jpg 1"))
    noise = ("data.noise.kind=symmetric_exclusive", "data.noise.rate=0.5")
    code, text = look(capsys, tmp_path / "sheet.png", *arguments, *noise)
    assert code == 0 and "queries: 1 of 12 labels differ" in text
    assert "label noise: symmetric_exclusive, 6 of 12 training labels are wrong" in text
