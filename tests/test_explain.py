"""`exnorm explain`: what a trained model makes of single images."""

from pathlib import Path

import numpy as np
import pytest
from conftest import CliRunner
from engine_cases import make_image_folder, tiny, train_here
from PIL import Image

from exnorm.config.errors import UserError
from exnorm.diagnostics.explain_images import explain_images
from exnorm.report.image_figure import image_figure
from exnorm.report.palette import colour

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three colours."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def run_of_en(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EN whose ratios have left 1/3."""
    return train_here(tiny(data, "norm=en", "optim.lr=0.3"), tmp_path_factory.mktemp("en"))


def test_each_image_has_its_own_ratios_and_prediction(run_of_en: Path, data: Path, tmp_path: Path) -> None:
    """They sum to 1 in every layer; the drawn lines are they; a copy of an image is explained as the image."""
    cat, elk = data / "val" / "cat" / "1.png", data / "val" / "elk" / "1.png"
    copy = tmp_path / "copy.png"
    copy.write_bytes(cat.read_bytes())
    first, second, again = explain_images(run_of_en, [cat, elk, copy])
    for item in (first, second):
        assert np.allclose(item.ratios.groupby("layer")["mean"].sum(), 1, atol=1e-5)
        assert item.pixels.shape == (32, 32, 3) and sum(share for _, share in item.guesses) == pytest.approx(1)
        assert {name for name, _ in item.guesses} == {"cat", "dog", "elk"}
    assert not np.allclose(first.ratios["mean"], second.ratios["mean"], atol=1e-6)
    assert first.ratios.equals(again.ratios) and first.guesses == again.guesses

    figure = image_figure([first, second], "title")
    lines = {line.get_label(): line for line in figure.axes[3].get_lines()}
    bn = second.ratios.query("normalizer == 'bn'")
    assert list(lines["BN"].get_ydata()) == list(bn["mean"]) and lines["BN"].get_color() == colour("bn")
    assert np.array_equal(figure.axes[2].images[0].get_array(), second.pixels)


def test_what_cannot_be_explained_is_one_line(run_of_en: Path, data: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    image = str(data / "val" / "cat" / "1.png")
    plain = train_here(tiny(data, "norm=gn", "trainer.epochs=1"), tmp_path)
    for run, path, said in (
        (run_of_en, text, "text.png is not a readable image"),
        (run_of_en, tmp_path / "none.png", "none.png is not a readable image"),
        (plain, Path(image), "norm=gn does not mix normalizers. Use a run of sn, ssn or en"),
    ):
        with pytest.raises(UserError, match=said):
            explain_images(run, [path])
    refused = cli_here("explain", str(run_of_en), image, "--out", "out.jpeg")
    assert refused.returncode == 2 and "ends with .png or .svg" in refused.stderr and refused.stdout == ""
    done = cli_here("explain", str(run_of_en), image, "--out", str(tmp_path / "out.png"))
    assert done.returncode == 0 and done.stdout.startswith("1.png: ")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 500
