"""Drawn sets with masks: the same bytes everywhere, masks that fit what is drawn, and a validation set of its own."""

import functools
import hashlib
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from exnorm import data
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import drawing, pixel_file, rendered, scenes, streets
from exnorm.data.sets import glyph_scenes, glyph_streets, glyphs
from exnorm.data.splits import IGNORED, MaskedImages

SETS = {"glyph_scenes": glyph_scenes, "glyph_streets": glyph_streets}
SMALL = ("data.num_train=12", "data.num_val=6")
PLAIN = drawing.Style(
    **{"height": (0.24, 0.6), "contrast": (0.5, 0.5), "brightness": (0.5, 0.5), "quality": (95, 95)},
    **dict.fromkeys(("shift", "cast", "texture", "noise", "blur"), (0.0, 0.0)),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pixel_file._mapped.cache_clear()
    return tmp_path / "exnorm"


@functools.cache
def composed(name: str) -> Any:
    """The configuration of a set; composed once, as that takes a while."""
    return compose_train([f"data={name}", "task=segmentation"]).data


def config_of(name: str, *overrides: str) -> Any:
    """The configuration of a set with overrides."""
    return OmegaConf.merge(composed(name), OmegaConf.from_dotlist([word.removeprefix("data.") for word in overrides]))


def val_plan(name: str, *overrides: str) -> Any:
    """The plan of a set's validation images."""
    return SETS[name].plans(config_of(name, *overrides))[1]


def drawn(plan: Any, count: int) -> np.ndarray:
    """The first images of a plan with their masks."""
    module = {scenes.Plan: scenes, streets.Plan: streets}[type(plan)]
    return np.stack([module.draw(plan, index) for index in range(count)])


def sha(*arrays: np.ndarray) -> str:
    """The hash of some arrays."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:32]


def test_glyphs_kept_their_bytes_and_fingerprints(cache: Path) -> None:
    """Runs and cache files of earlier versions stay valid."""
    config = compose_train(["data=glyphs"]).data
    fingerprint = data.fingerprint(config)
    assert fingerprint[:24] == "f960927ea77c43a33d5ebe22" and fingerprint[64:88] == "f3b6bc208704122edfed0939"
    plan, _ = glyphs.plans(config, glyphs.STYLE, glyphs.TRAIN_FONTS, glyphs.VAL_FONTS)
    assert sha(*(drawing.draw(plan, index) for index in range(30))) == "89c6e71de0bd6aef8ef2d7c057af35f7"
    data.load(compose_train(["data=glyphs", "data.num_train=10", "data.num_val=10"]).data)
    files = sorted(cache.glob("images-*.bin"))
    assert [file.name for file in files] == [
        "images-696d18af06774764cc34d85d.bin",
        "images-c9d6b2cde80168b7c405e0fe.bin",
    ]
    assert hashlib.sha256(files[0].read_bytes()).hexdigest()[:16] == "9be3a456a6814512"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("glyph_scenes", "83b6e8e90b5f7904714cc4ce564460c7"),
        ("glyph_streets", "5299b9e5ee1522f1687d6a88ee7f1cd6"),
    ],
)
def test_images_and_masks_are_the_same_bytes_on_every_machine(name: str, digest: str, cache: Path) -> None:
    """The hash of all pixels: it changes only with the fonts, or with a new `VERSION` of the drawing."""
    splits = data.load(config_of(name, *SMALL))
    found = [part for images in (splits.train, splits.val) for i in range(len(images)) for part in images.open(i)]
    assert sha(*map(np.asarray, found)) == digest


@pytest.mark.parametrize("name", SETS)
def test_another_seed_and_another_split_draw_other_images(name: str) -> None:
    first, same, other = (drawn(val_plan(name, f"data.seed={seed}"), 2) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first[..., 3], other[..., 3]) and not np.array_equal(first[0], first[1])
    train, val = SETS[name].plans(config_of(name))
    assert not np.array_equal(drawn(train, 1), drawn(val, 1))


@pytest.mark.parametrize("name", SETS)
def test_the_number_of_processes_does_not_matter(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "FEW", 0)
    want = drawn(val_plan(name), 5)
    for cores in (1, 2):
        monkeypatch.setattr(rendered, "available_cores", lambda cores=cores: cores)
        images = rendered.masked_images(val_plan(name), 5)
        for index in range(5):
            image, mask = images.open(index)
            assert np.array_equal(np.asarray(image), want[index, ..., :3])
            assert np.array_equal(np.asarray(mask), want[index, ..., 3])
        for file in cache.glob("images-*.bin"):
            file.unlink()
        pixel_file._mapped.cache_clear()


@pytest.mark.parametrize(("name", "size"), [("glyph_scenes", (96, 96)), ("glyph_streets", (192, 96))])
def test_a_mask_fits_its_image_and_has_only_classes(name: str, size: tuple[int, int], cache: Path) -> None:
    splits = data.load(config_of(name, *SMALL))
    assert isinstance(splits.train, MaskedImages) and (len(splits.train), len(splits.val)) == (12, 6)
    assert splits.train.same_size and splits.val.same_size
    for index in range(6):
        image, mask = splits.val.open(index)
        assert (image.mode, image.size) == ("RGB", size) and (mask.mode, mask.size) == ("L", size)
        assert set(np.unique(np.asarray(mask)).tolist()) <= {*range(len(splits.classes)), IGNORED}


@pytest.mark.parametrize("name", SETS)
def test_every_class_is_in_many_validation_images(name: str) -> None:
    """In a fifth of them at least, and in every ten images the scenes have every digit."""
    masks = drawn(val_plan(name), 40)[..., 3]
    images_with = [(masks == label).any((1, 2)).sum() for label in range(len(SETS[name].CLASSES))]
    assert min(images_with) >= 8
    if name == "glyph_scenes":
        assert all((masks[:10] == label).any() for label in range(11))


def test_validation_has_fonts_and_cities_of_its_own() -> None:
    for name, module in SETS.items():
        train, val = module.plans(config_of(name))
        assert not set(train.fonts) & set(val.fonts) and train.fonts and val.fonts
    train, val = glyph_streets.plans(config_of("glyph_streets"))
    colours = [streets.palette(city) for city in (*train.cities, *val.cities)]
    assert len({colour.tobytes() for colour in colours}) == len(colours) == 24
    assert not set(train.cities) & set(val.cities)


def test_the_mask_is_where_the_digit_is() -> None:
    """Without texture, noise, blur and other characters, the image differs from its background there and only there."""
    plan = val_plan("glyph_scenes")._replace(style=PLAIN, numbers=(1, 1, 0, 0))
    for index, scene in enumerate(drawn(plan, 20).astype(int)):
        away, mask = np.abs(scene[..., :3] - 127).max(-1), scene[..., 3]
        inside = mask == index % 10 + 1
        assert away[inside].min() > 0.4 * 127 and inside.sum() > 30
        assert away[mask == scenes.BACKGROUND].max() < 0.25 * 127
        assert set(np.unique(mask[~inside]).tolist()) == {scenes.BACKGROUND, IGNORED}


def test_a_character_covers_what_was_there() -> None:
    """From half of a pixel on it is the class, below that the pixel is ignored, and a trace of it changes nothing."""
    canvas = scenes.Canvas(np.zeros((2, 6, 3), np.float32), np.full((2, 6), 7, np.uint8))
    covered = np.array([[1, 0.5, 0.49, 0.15, 0.14]], np.float32)
    scenes.paint(canvas, covered, np.s_[1:2, 1:6], [1, 1, 1], 3)
    assert canvas.mask_HW.tolist() == [[7] * 6, [7, 3, 3, IGNORED, IGNORED, 7]]
    assert np.array_equal(canvas.levels_HWC[1, 1:, 0], covered[0]) and not canvas.levels_HWC[0].any()


def test_letters_are_background() -> None:
    plan = val_plan("glyph_scenes")
    only = plan._replace(style=PLAIN, numbers=(1, 1, 2, 2))
    scene = drawn(only, 1)[0].astype(int)
    away = np.abs(scene[..., :3] - 127).max(-1) > 0.5 * 127
    assert set(np.unique(scene[..., 3]).tolist()) == {0, 1, IGNORED}
    assert (away & (scene[..., 3] == scenes.BACKGROUND)).sum() > 50


def test_no_character_hides_more_than_a_third_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one shares at most 30 % of its pixels with those before, and covers at most 30 % of each of them."""
    canvases = []

    def kept(*arguments: Any) -> scenes.Canvas:
        canvases.append(made(*arguments))
        return canvases[-1]

    made = scenes.Canvas
    monkeypatch.setattr(scenes, "Canvas", kept)
    drawn(val_plan("glyph_scenes"), 20)
    for canvas in canvases:
        for index, one in enumerate(canvas.characters):
            before = canvas.characters[:index]
            assert not before or (one & np.any(before, 0)).sum() <= 0.3 * one.sum()
            assert all((one & other).sum() <= 0.3 * other.sum() for other in before)
    assert np.mean([len(canvas.characters) for canvas in canvases]) > 4


def test_objects_stand_where_they_belong() -> None:
    """Cars on the road, so that their pixels are in the lower half; signs above the sidewalk."""
    masks = drawn(val_plan("glyph_streets"), 20)[..., 3]
    rows = {name: np.nonzero(masks == label)[1].mean() for label, name in enumerate(streets.CLASSES)}
    assert rows["sky"] < rows["sign"] < rows["person"] < rows["bicycle"] < rows["car"]


@pytest.mark.parametrize("name", SETS)
def test_the_fingerprint_changes_with_what_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the font files; not with what the loader does."""
    first = data.fingerprint(config_of(name))
    others = [data.fingerprint(config_of(name, f"data.{change}")) for change in ("num_train=9", "num_val=9", "seed=1")]
    same = ("data.workers=3", "data.zoom=[0.5,1.0]", "data.image_size=32", "data.resize=128")
    assert data.fingerprint(config_of(name, *same)) == first
    monkeypatch.setattr(rendered, "_hash", lambda file: "another file")
    others.append(data.fingerprint(config_of(name)))
    monkeypatch.setattr(scenes if name == "glyph_scenes" else streets, "VERSION", 1000)
    others.append(data.fingerprint(config_of(name)))
    assert len({first, *others}) == 6


def test_the_fingerprint_needs_no_torch() -> None:
    """The controller computes it."""
    code = f"""
import sys
from exnorm import data
from exnorm.config.compose import compose_train
for name in {list(SETS)}:
    data.fingerprint(compose_train(["data=" + name, "task=segmentation"]).data)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize("name", SETS)
def test_without_training_no_training_image_is_drawn(name: str, cache: Path) -> None:
    splits = data.load(config_of(name, *SMALL), train=False)
    assert isinstance(splits.train, MaskedImages) and len(splits.train) == 0 and len(splits.val) == 6
    assert len(list(cache.glob("images-*.bin"))) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.root=/data", "data.root=/data: NAME are drawn and take no folder. Leave it out"),
        ("data.num_train=0", "data.num_train=0: give 1 image or more"),
        ("data.num_val=-1", "data.num_val=-1: give 1 image or more"),
        ("data.num_classes=10", "data.num_classes=10: NAME has no such option. Leave it out"),
        ("data.noise={kind: symmetric, rate: 0.2}", "data.noise changes labels, and NAME has masks"),
    ],
)
@pytest.mark.parametrize("name", SETS)
def test_bad_options_get_one_line(name: str, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line.replace("NAME", name)):
        data.fingerprint(config_of(name, override))


def test_another_validation_set_needs_the_classes_of_the_run(cache: Path) -> None:
    config = config_of("glyph_scenes", *SMALL)
    splits = data.load(config)
    config.val = ["glyph_scenes"]
    assert data.validation_sets(config, splits) == {"glyph_scenes": splits.val}
    config.val = ["glyph_scenes", "glyph_streets"]
    with pytest.raises(UserError, match="data=glyph_streets has 10 classes, and 11 of the run's 11 are not among them"):
        data.validation_sets(config, splits)


def test_no_character_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest one, sheared as strongly as the style allows, has a margin on the canvas where it is drawn."""
    canvases = []

    def kept(*arguments: Any, **options: Any) -> np.ndarray:
        canvases.append(drawing.character(*arguments, **options))
        return canvases[-1]

    monkeypatch.setattr(scenes, "character", kept)
    for plan in glyph_scenes.plans(config_of("glyph_scenes")):
        for font, shear, height in product(plan.fonts, plan.style.shear, plan.style.height):
            style = plan.style._replace(shear=(shear, shear), height=(height, height))
            scenes.drawn_character(random.Random(0), "W", [font], style, plan.size, bolder=scenes.BOLDER)
    assert len(canvases) == 44
    for covered in canvases:
        assert covered.any() and not np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]]).any()
