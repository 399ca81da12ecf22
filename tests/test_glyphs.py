"""Glyphs: the same bytes everywhere, fonts that validation alone has, and a cache that several processes may want."""

import hashlib
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_cases import ROOT
from PIL import Image, ImageDraw, ImageFont

from exnorm import data
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data import pixel_file, rendered
from exnorm.data.drawing import Plan, Style, draw
from exnorm.data.sets import glyphs, glyphs_web

FONTS = (glyphs.TRAIN_FONTS, glyphs.VAL_FONTS, glyphs_web.TRAIN_FONTS, glyphs_web.VAL_FONTS)
SMALL = ("data.num_train=24", "data.num_val=12", "data.image_size=16")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pixel_file._mapped.cache_clear()
    return tmp_path / "exnorm"


def config_of(name: str, *overrides: str) -> Any:
    """The configuration of a set."""
    return compose_train([f"data={name}", *overrides]).data


def font_file(name: str) -> str:
    """A font's path."""
    return glyphs.font_files([name])[0]


def plan_of(count: int = 3, **values: Any) -> Plan:
    """A plan of a few classes."""
    fonts = [font_file(name) for name in ("DejaVuSans", "cmr10")]
    return Plan(
        **{"texts": list("ABC")[:count], "fonts": fonts, "style": Style(), "size": 16, "seed": "test", **values}
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("glyphs", "146d5e5e03750242cd82b3f94c3eac9f"),
        ("glyphs_web", "ce0bd2747abc31514872fbf817ce466d"),
    ],
)
def test_the_images_are_the_same_bytes_on_every_machine(name: str, digest: str, cache: Path) -> None:
    """The hash of all pixels and labels: it changes only with the fonts, or with a new `VERSION` of the drawing."""
    splits = data.load(config_of(name, *SMALL, "data.num_classes=12"))
    found = hashlib.sha256(bytes(int(label) for label in splits.train.labels))
    for images in (splits.train, splits.val):
        for index in range(len(images)):
            found.update(images.open_image(index).tobytes())
    assert found.hexdigest()[:32] == digest


def test_no_font_serves_twice() -> None:
    """Validation sees fonts that training did not, and the web's are others again: 21 in all."""
    names = [name for fonts in FONTS for name in fonts]
    assert len(names) == len(set(names)) == 21
    assert all(Path(font_file(name)).is_file() for name in names)


@pytest.mark.parametrize("font", [name for fonts in FONTS for name in fonts])
def test_every_font_draws_every_character(font: str) -> None:
    """No box for a missing one, and no two alike."""
    face = ImageFont.truetype(font_file(font), 32, layout_engine=ImageFont.Layout.BASIC)
    drawn = {}
    for character in (*glyphs.SINGLES, "\ue123"):  # the last one is in no font
        canvas = Image.new("L", (64, 64))
        ImageDraw.Draw(canvas).text((8, 8), character, font=face, fill=255)
        drawn[character] = np.asarray(canvas).astype(int)
    differences = {(a, b): np.abs(drawn[a] - drawn[b]).sum() for a, b in combinations(drawn, 2)}
    assert min(differences.values()) > 10 * 255, min(differences, key=lambda pair: differences[pair])


def test_classes_are_digits_then_letters_and_symbols_then_pairs() -> None:
    """A thousand different ones; fewer classes are the first of them."""
    names = glyphs.class_names(1000)
    assert len(set(names)) == 1000 and "".join(names[:10]) == "0123456789"
    assert {len(name) for name in names[:52]} == {1} and {len(name) for name in names[52:]} == {2}
    assert glyphs.class_names(10) == names[:10]


def test_classes_are_balanced_and_each_is_mistaken_for_another(cache: Path) -> None:
    splits = data.load(config_of("glyphs", *SMALL))
    counts = np.bincount(splits.val.labels, minlength=10)
    assert counts.max() - counts.min() <= 1 and len(splits.classes) == 10
    assert splits.mistaken_for is not None and all(i != j for i, j in enumerate(splits.mistaken_for))
    assert splits.mistaken_for[3] == 5 and splits.mistaken_for[8] == 6


def test_an_image_depends_on_its_number_alone(cache: Path) -> None:
    """Drawn by several processes into the file, or one by one; another seed draws others."""
    count = rendered.FEW + 3
    images = rendered.images(plan_of(), count)
    for index in (0, 1, count // 2, count - 1):
        assert np.array_equal(np.asarray(images.open_image(index)), draw(plan_of(), index))
    assert not np.array_equal(draw(plan_of(), 0), draw(plan_of(seed="other"), 0))


def test_a_damaged_cache_is_drawn_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut off, changed in one byte, or no such file at all: said once, and mended."""
    want = rendered.images(plan_of(), 4).open_image(3).tobytes()
    (file,) = cache.glob("images-*.bin")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b"", b"x" * len(whole)):
        file.write_bytes(damaged)
        pixel_file._mapped.cache_clear()
        assert rendered.images(plan_of(), 4).open_image(3).tobytes() == want
        assert file.read_bytes() == whole
        assert f"{file} is damaged; it is made again" in capsys.readouterr().err
    rendered.images(plan_of(), 4)
    assert capsys.readouterr().err == ""


def test_processes_that_want_the_same_images_at_once_get_them(cache: Path) -> None:
    """One draws them, the other waits; nothing half-made is left."""
    code = f"""
import hashlib
from exnorm import data
from exnorm.config.compose import compose_train
images = data.load(compose_train(["data=glyphs", *{[*SMALL, "data.num_train=300"]!r}]).data).train
print(hashlib.sha256(b"".join(images.open_image(i).tobytes() for i in range(300))).hexdigest())
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate(timeout=600)[0] for process in processes}) == 1
    assert all(process.returncode == 0 for process in processes)
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".bin", ".lock", ".lock"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.num_classes=5", "data.num_classes=5: glyphs has 10 to 1000"),
        ("data.num_classes=1001", "data.num_classes=1001: glyphs has 10 to 1000"),
        ("data.num_val=3", "data.num_val=3: give at least one image per class"),
        ("data.root=/data", "data.root=/data: glyphs are drawn and take no folder. Leave it out"),
    ],
)
def test_bad_options_get_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line.replace("(", r"\(")):
        data.fingerprint(config_of("glyphs", override))


def test_the_options_of_drawn_sets_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="data.num_classes=20: digits has no such option. Leave it out"):
        data.fingerprint(config_of("digits", "data.num_classes=20"))


def test_the_fingerprint_changes_with_what_is_drawn() -> None:
    """Every option that reaches a pixel, and none that does not."""
    first = data.fingerprint(config_of("glyphs"))
    changes = ("num_classes=11", "num_train=100", "num_val=100", "image_size=24", "seed=1")
    others = [data.fingerprint(config_of("glyphs", f"data.{change}")) for change in changes]
    assert len({first, *others, data.fingerprint(config_of("glyphs_web"))}) == len(changes) + 2
    assert data.fingerprint(config_of("glyphs", "data.workers=3", "data.scale=[0.5,1.0]")) == first
