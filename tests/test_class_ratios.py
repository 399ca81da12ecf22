"""`exnorm ratios --by-class`: what EN mixes for the images of each class, its figures, and its place in a record."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CliRunner
from engine_cases import make_image_folder, tiny, train_here

from exnorm.analysis.ratios import read_ratios
from exnorm.config.errors import UserError
from exnorm.data.transforms import eval_transform
from exnorm.diagnostics.class_ratios import measured_sets
from exnorm.diagnostics.explain_images import explain_images
from exnorm.engine import checkpoint
from exnorm.report import class_figures
from exnorm.report.palette import colour
from exnorm.runs.folder import RunFolder
from exnorm.studies.collect import classes_of

NAMES = ("in", "ln", "bn")


def ratios(means: dict[str, list[float]], *, epoch: int = 1, layer: str = "bn1", std: float = 0.0) -> pd.DataFrame:
    """A table of ratios with the shares of IN, LN and BN of each class in one layer."""
    rows = [
        (epoch, layer, label, normalizer, 5, mean, std)
        for label, shares in means.items()
        for normalizer, mean in zip(NAMES, shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["epoch", "layer", "class", "normalizer", "images", "mean", "std"])


def test_similarity_is_the_cosine_of_what_classes_differ_in() -> None:
    """Of three classes two deviate from the mean in opposite ways, and one not at all."""
    found = class_figures.similarity_data(ratios({"a": [0.6, 0.2, 0.2], "b": [0.4, 0.3, 0.3], "c": [0.2, 0.4, 0.4]}))
    wide = found.pivot_table(index="class", columns="other", values="cosine", sort=False, dropna=False)
    assert wide.loc["a", "a"] == pytest.approx(1) and wide.loc["a", "c"] == pytest.approx(-1)
    assert all(math.isnan(wide.loc["b", label]) for label in "abc")  # the mean itself has no direction
    drawn = class_figures.draw_similarity(found, "t").axes[0].images[0].get_array()
    assert drawn is not None and drawn.shape == (3, 3)
    assert class_figures.similarity_data(ratios({"a": [1, 0, 0], "b": [0, 1, 0]})).empty


def test_spread_within_and_between_classes_makes_up_the_variance_over_images() -> None:
    draw = np.random.default_rng(0)
    images = {label: draw.dirichlet([1, 2, 3], size=5) for label in "abcd"}
    frame = pd.concat(
        [ratios({label: list(shares.mean(0))}).assign(std=shares.std(0)) for label, shares in images.items()]
    )
    found = class_figures.spread_data(frame).set_index("normalizer")
    variance = np.concatenate(list(images.values())).var(0)
    assert (found["within"] ** 2 + found["between"] ** 2)[list(NAMES)].to_numpy() == pytest.approx(variance)


def test_difference_is_left_less_right_after_the_last_epoch() -> None:
    left = pd.concat([ratios({"a": [0.9, 0.1, 0.0]}), ratios({"a": [0.6, 0.3, 0.1], "b": [0.4, 0.5, 0.1]}, epoch=2)])
    right = ratios({"a": [0.2, 0.7, 0.1], "b": [0.2, 0.5, 0.3]})
    found = class_figures.difference_data(left, right)
    assert list(found.normalizer) == list(NAMES) and found.difference.to_numpy() == pytest.approx([0.3, -0.2, -0.1])
    drawn = class_figures.draw_differences(found.assign(pair="p"), "t").axes[0]
    assert [bar.get_height() for bar in drawn.patches] == pytest.approx([0.3, -0.2, -0.1])
    assert drawn.patches[2].get_facecolor()[:3] == pytest.approx(
        tuple(int(colour("bn")[i : i + 2], 16) / 255 for i in (1, 3, 5))
    )


def test_classes_over_training_are_four_in_three_layers() -> None:
    layers = [f"l{i}" for i in range(5)]
    labels = {str(i): [0.5, 0.3, 0.2] for i in range(10)}
    last = pd.concat([ratios(labels, epoch=9, layer=layer, std=0.1) for layer in layers])
    first = pd.concat([ratios(labels, epoch=3, layer=layer, std=0.1) for layer in ("l0", "l2", "l4")])
    data = class_figures.dynamics_data(pd.concat([first, last]))
    assert list(data["class"].unique()) == ["0", "3", "6", "9"] and set(data.layer) == {"l0", "l2", "l4"}
    figure = class_figures.draw_dynamics(data, "t")
    assert len(figure.axes) == 12
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["IN"].get_xdata()) == [3, 9] and list(lines["LN"].get_ydata()) == [0.3, 0.3]
    assert class_figures.dynamics_data(last).empty  # one checkpoint is no course


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three colours."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def run_of_en(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EN, two epochs, of which the first is kept."""
    return train_here(tiny(data, "norm=en", "optim.lr=0.3", "trainer.snapshots=[0.5]"), tmp_path_factory.mktemp("en"))


@pytest.mark.slow
def test_the_ratios_of_a_class_are_those_of_its_images(run_of_en: Path, data: Path, tmp_path: Path) -> None:
    """Measured by hand on the class's images, one by one; the snapshot has the three layers alone and other ratios."""
    (name, frame), *others = measured_sets(run_of_en, [], []).items()
    assert name == "imagefolder" and not others and set(frame.images) == {7}
    elk = sorted((data / "val" / "elk").iterdir())
    by_hand = pd.concat([item.ratios for item in explain_images(run_of_en, elk)])
    expected: pd.DataFrame = by_hand.groupby(["layer", "normalizer"])["mean"].agg(
        mean="mean", std=lambda x: x.std(ddof=0)
    )
    found = frame.query("epoch == 2 and `class` == 'elk'").set_index(["layer", "normalizer"])
    assert np.allclose(found[["mean", "std"]], expected.loc[found.index], atol=2e-5)
    layers = list(frame.query("epoch == 2").layer.unique())
    before = frame.query("epoch == 1")
    assert set(layers) == set(by_hand.layer) and len(layers) > 3
    assert list(before.layer.unique()) == [layers[0], layers[len(layers) // 2], layers[-1]]
    assert not np.allclose(before["mean"], frame.query("epoch == 2 and layer in @before.layer")["mean"], atol=1e-4)

    row = classes_of(next(run_of_en.glob("class_ratios-*.csv")), own=True)[0]
    assert (row["epoch"], row["images"], row["class"]) == ("1", "7", "cat") and 0 < float(row["mean"]) < 1
    assert {row["epoch"] for row in classes_of(next(run_of_en.glob("class_ratios-*.csv")), own=False)} == {"2"}


@pytest.mark.slow
def test_the_command_draws_and_compares_sets_and_refuses_in_one_line(
    run_of_en: Path, data: Path, tmp_path: Path, cli_here: CliRunner
) -> None:
    other = make_image_folder(tmp_path / "other", val=3)
    done = cli_here("ratios", run_of_en, f"data.root={other}", "--class", "elk", "--class", "cat", "--class", "dog")
    assert done.returncode == 0, done.stderr
    assert "Images of imagefolder-other: mean ratio" in done.stdout
    drawn = {path.name for path in (run_of_en / "figures").glob("*.svg")}
    assert {"classes-imagefolder.svg", "similarity-imagefolder-other.svg", "difference-imagefolder-other.svg"} <= drawn
    page = (run_of_en / "figures" / "ratios.html").read_text(encoding="utf-8")
    assert "by class, imagefolder" in page and "all images" in page
    plain = train_here(tiny(data, "norm=sn", "trainer.epochs=1"), tmp_path)
    for run, words, said in (
        (plain, [], "only norm=en has them"),
        (run_of_en, ["batch=1x8"], "batch=1x8: --by-class takes data=NAME and data.KEY=VALUE"),
    ):
        with pytest.raises(UserError, match=said):
            measured_sets(run, words, [])
    with pytest.raises(UserError, match="--class eland: .*elk"):
        measured_sets(run_of_en, [], ["eland"])


@pytest.mark.slow
def test_reading_ratios_leaves_the_mode_of_the_model(run_of_en: Path) -> None:
    model = checkpoint.load(run_of_en).train()
    config = checkpoint.read_config(RunFolder(run_of_en))
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    found = read_ratios(model, eval_transform(config.data).normalize(pixels))
    assert model.training and all(value["lambda"].shape == (2, 3) for value in found.values())
