"""`exnorm doctor` on sets with masks, and the colours in which it shows them."""

import re
from pathlib import Path

import numpy as np
import pytest
from mask_cases import make_camvid, make_segfolder, save_mask
from PIL import Image

from exnorm.data.palette import colours, overlaid
from exnorm.data.splits import IGNORED
from exnorm.diagnostics.doctor_data import run
from exnorm.diagnostics.doctor_masks import COLUMNS
from exnorm.diagnostics.mask_sheet import GAP, TILE

CLASSES = ("sky", "road", "car", "bicycle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set of four classes, of which the last one does not occur: class n modulo 3 in image n, and a pixel of none."""
    root = make_segfolder(tmp_path / "in", train=6, val=2)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def look(capsys: pytest.CaptureFixture[str], root: Path, *overrides: str, images: int = 0) -> tuple[int, str]:
    """The exit code and what was printed."""
    words = ["data=segfolder", f"data.root={root}", "data.workers=0", *overrides]
    return run(words, images, root.parent / "sheet.png"), capsys.readouterr().out


def test_a_good_set_passes_with_the_shares_of_its_classes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_mask(root / "train/masks/drive 0/0.png", [255, *[0] * 24, *[1] * 23])
    code, text = look(capsys, root)
    assert code == 0
    assert "train: 6 images with masks of 4 classes" in text and "train: 6 of 6 opened images are good" in text
    assert "val (segfolder): 2 images with masks of 4 classes" in text
    assert "width x height from 8 x 6 over 8 x 6 to 8 x 6" in text
    rows = {name: line.split()[-4:] for line in text.splitlines() for name in CLASSES if line.startswith(f"{name} ")}
    pixels = {"sky": (24 + 47, 47), "road": (23 + 94, 47), "car": (94, 0), "bicycle": (0, 0)}  # of 282 and 94
    for name, (train, val) in pixels.items():
        assert [float(rows[name][0]), float(rows[name][2])] == [round(100 * train / 282, 3), round(100 * val / 94, 3)]
    assert [rows[name][1] for name in CLASSES] == ["2", "3", "2", "0"]  # images that have the class
    assert next(line.split()[-4:] for line in text.splitlines() if line.startswith("no class")) == [
        f"{100 * 6 / 288:.3f}", "6", f"{100 * 2 / 96:.3f}", "2"
    ]  # fmt: skip
    assert "train: no opened mask has bicycle" in text and "val (segfolder): no opened mask has car, bicycle" in text


def test_mean_and_deviation_are_those_of_the_pixels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = look(capsys, root)
    line = next(line for line in text.splitlines() if line.startswith("  mean"))
    found = [float(word) for word in re.sub(r"[(),;]", " ", line).split() if word[0].isdigit()]
    reds = (20 + 25 * np.arange(6)) / 255
    assert np.allclose([found[0], found[1]], [reds.mean(), 40 / 255], atol=0.01)
    assert np.allclose([found[6], found[7]], [reds.std(), 0], atol=0.01) and line.endswith("far from each other")


def test_the_sheet_shows_each_image_under_its_mask(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look(capsys, root)
    sheet = np.asarray(Image.open(root.parent / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == COLUMNS * (TILE[0] + GAP)
    numbers = [0, 2, 4, 1, 3, 5]  # in the order of the files
    for place, number in enumerate(numbers):
        pixel = sheet[TILE[1] // 2, place * (TILE[0] + GAP) + TILE[0] // 2]
        wanted = 0.6 * colours(4)[number % 3] + 0.4 * np.array([20 + 25 * number, 40, 40])
        assert np.abs(pixel - wanted).max() < 6


def test_broken_files_are_listed_for_exclusion(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image, a mask, and a mask of another size; the list leaves them out."""
    (root / "train/images/drive 0/0.jpg").write_text("<html>")
    (root / "val/masks/drive 1/1.png").write_bytes(b"")
    save_mask(root / "train/masks/drive 1/3.png", 0, size=(4, 4))
    code, text = look(capsys, root)
    listing = root.parent / "segfolder-broken.txt"
    assert code == 1 and "train: 4 of 6 opened images are good" in text
    assert "FAIL: broken validation images" in text and "FAIL: 33.33 % of the training images are broken" in text
    assert listing.read_text().splitlines()[1::2] == [
        "train/images/drive 0/0.jpg",
        "train/masks/drive 1/3.png",
        "val/masks/drive 1/1.png",
    ]
    assert "# the mask has 4 x 4 pixels, its image 8 x 6" in listing.read_text()
    code, text = look(capsys, root, f"data.exclude={listing}")
    assert code == 0 and "train: 4 images with masks of 4 classes; 2 excluded" in text


def test_files_without_a_partner_are_listed_for_exclusion(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of both splits at once."""
    (root / "train/masks/drive 0/0.png").unlink()
    save_mask(root / "val/masks/new.png", 0)
    listing = root.parent / "segfolder-broken.txt"
    code, text = look(capsys, root)
    assert code == 1 and "1 of the 6 images in train/images/ have no mask" in text
    assert "1 of the 3 masks in val/masks/ have no image" in text and f"data.exclude={listing} leaves them out" in text
    assert listing.read_text().splitlines() == [
        "# it has no mask",
        "train/images/drive 0/0.jpg",
        "# it has no image",
        "val/masks/new.png",
    ]
    code, text = look(capsys, root, f"data.exclude={listing}")
    assert code == 0 and "train: 5 images with masks of 4 classes; 1 excluded" in text


def test_masks_with_wrong_values_are_counted_by_value(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are a mistake of the whole set, so no list leaves them out."""
    save_mask(root / "train/masks/drive 0/0.png", [7, 9, *[0] * 46])
    save_mask(root / "train/masks/drive 0/2.png", [7, 7, *[0] * 46])
    Image.new("RGB", (8, 6)).save(root / "val/masks/drive 0/0.png")
    code, text = look(capsys, root)
    assert code == 1 and "FAIL: 3 of the opened masks have values that are no classes" in text
    assert "  wrong: train/masks/drive 0/0.png has values that are no classes: 7 (1 px), 9 (1 px)" in text
    assert "values that are no classes, and the number of masks that have them: 7 in 2, 9 in 1\n" in text
    assert "  wrong: val/masks/drive 0/0.png is a colour image" in text
    assert "train: 4 of 6 opened images are good" in text
    assert not (root.parent / "segfolder-broken.txt").exists()


def test_a_look_at_a_part_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(capsys, root, images=3)
    assert code == 0 and "train: 3 of 3 opened images are good (of 6; --images 0 opens all)" in text


def test_an_incomplete_set_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_camvid(tmp_path / "in", suffix=".jpg", lists=False)
    assert run(["data=camvid", f"data.root={root}"], 0, tmp_path / "sheet.png") == 0
    text = capsys.readouterr().out
    assert "train: 6 images with masks of 11 classes; the complete set has 367" in text
    assert "val (camvid): 3 images with masks of 11 classes; the complete set has 101" in text


def test_colours_are_distinct_and_do_not_depend_on_the_number_of_classes() -> None:
    every = colours(255)
    assert every.dtype == np.uint8 and len(np.unique(every, axis=0)) == 255
    for n in (0, 1, 19, 150):
        assert (colours(n) == every[:n]).all()
    first = colours(20).astype(int)
    distances = np.abs(first[:, None] - first[None]).sum(-1)
    assert distances[~np.eye(20, dtype=bool)].min() >= 100
    assert (np.ptp(every.astype(int), 1) >= 60).all()  # no greys, which are the colours of ignored pixels' images
    colours(3)[:] = 0
    assert (colours(255) == every).all()
    with pytest.raises(ValueError, match="n=256"):
        colours(256)


def test_ignored_pixels_stay_as_they_are() -> None:
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    mask = Image.fromarray(np.array([[1, IGNORED]], np.uint8))
    shown = overlaid(image, mask, colours(2), opacity=0.5)
    assert shown.getpixel((1, 0)) == (100, 100, 100)
    assert np.allclose(shown.getpixel((0, 0)), 50 + colours(2)[1] / 2, atol=1)
