"""The explorer of ratios in the pages of `exnorm ratios` and `exnorm report`, used in a real browser."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from page_cases import DESKTOP, PHONE, look, run_with

from exnorm.config.study import load_study
from exnorm.report.explorer import RatioSet, explorer
from exnorm.report.html_report import run_page, study_page
from exnorm.report.page import page as page_of
from exnorm.report.ratios import run
from exnorm.runs.folder import RunFolder
from exnorm.runs.layer_ratios import CLASS_COLUMNS, read_all_class_ratios

SIZES = [DESKTOP, PHONE]
NORMALIZERS = ("in", "ln", "bn")
LAYERS = ("conv1.1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1")
Row = dict[str, Any]


def drawn(seed: int) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).dirichlet([2, 3, 4])]


def epoch_of(epoch: int, kinds: tuple[str, ...] = ("",), layers: tuple[str, ...] = LAYERS) -> Row:
    """The row of metrics after an epoch: EN's ratios with deviations, or SN's two kinds without."""
    row: Row = {"step": 10 * epoch, "epoch": epoch, "val/top1": 50.0, "val/loss": 1.0, "train/loss": 1.0, "lr": 0.1}
    for number, (layer, kind) in enumerate((layer, kind) for layer in layers for kind in kinds):
        for name, value in zip(NORMALIZERS, drawn(100 * epoch + number), strict=True):
            row[f"ratio/{layer}/{kind}{name}"] = value
            if not kind:
                row[f"ratio/{layer}/{name}/std"] = value / 7
    return row


def write_classes(folder: RunFolder, classes: list[str], *, file: str = "abc-20", data: str = "d") -> list[Row]:
    """A file of ratios by class: three layers after epoch 1, all after epoch 2."""
    rows = []
    for epoch, layers in ((1, (LAYERS[0], LAYERS[2], LAYERS[3])), (2, LAYERS)):
        for layer in layers:
            for number, label in enumerate(classes):
                means = drawn(1000 * epoch + 10 * LAYERS.index(layer) + number)
                for normalizer, mean in zip(NORMALIZERS, means, strict=True):
                    rows.append((data, epoch, layer, label, normalizer, 5, mean, mean / 9))
    frame = pd.DataFrame(rows, columns=list(CLASS_COLUMNS))
    frame.to_csv(folder.path / f"class_ratios-{file}.csv", index=False)
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def page_of_ratios(folder: RunFolder) -> Path:
    run(folder.path)
    return folder.path / "figures" / "ratios.html"


def numbers(page: Any) -> dict[str, list[str]]:
    """What the page says of each visible layer: a text for each bar."""
    found = page.evaluate("""() => [...document.querySelectorAll("#ratios-layers > .layer")]
        .filter((layer) => layer.checkVisibility()).map((layer) => [layer.querySelector(".name").textContent,
            [...layer.querySelectorAll(".line")].map((line) => line.innerText.split(/\\s+/).join(" "))])""")
    return dict(found)


def said(means: list[float], stds: list[float] | None = None) -> str:
    """The text of a bar."""
    spread = [f" ±{std:.4f}" for std in stds] if stds else ["", "", ""]
    parts = zip(NORMALIZERS, means, spread, strict=True)
    return " ".join(f"{name.upper()} {mean:.4f}{deviation}" for name, mean, deviation in parts)


def said_of(row: Row, layer: str, kind: str = "") -> str:
    """The text of the bar of a layer, from a row of metrics.jsonl."""
    stds = [row.get(f"ratio/{layer}/{name}/std") for name in NORMALIZERS]
    return said([row[f"ratio/{layer}/{kind}{name}"] for name in NORMALIZERS], None if None in stds else stds)  # type: ignore[arg-type]


def said_of_class(rows: list[Row], epoch: int, layer: str, label: str) -> str:
    """The text of the bar of a layer and class, from the rows of ratios by class."""
    found = [row for row in rows if (row["epoch"], row["layer"], row["class"]) == (epoch, layer, label)]
    return f"{label} {said([row['mean'] for row in found], [row['std'] for row in found])}"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_shows_the_numbers_of_the_metrics(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """With the keyboard; the bars are as long as the numbers say, and nothing is wider than the window."""
    folder = run_with(tmp_path / "run", [epoch_of(epoch) for epoch in (1, 2, 3)])
    page, trouble = look(browser, page_of_ratios(folder), size)
    rows = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    for index in (2, 0, 1):
        slider = page.get_by_role("slider", name="epoch")
        slider.press("Home")
        for _ in range(index):
            slider.press("ArrowRight")
        assert numbers(page) == {layer: [said_of(rows[index], layer)] for layer in LAYERS}
        assert slider.get_attribute("aria-valuetext") == f"epoch {index + 1}"
        assert page.get_by_text(f"epoch {index + 1} of 3").is_visible()
        shares_of_bar = page.locator("#ratios-layers .bar").first.evaluate(
            "bar => [...bar.children].map(part => part.getBoundingClientRect().width / bar.clientWidth)"
        )
        expected = [rows[index][f"ratio/{LAYERS[0]}/{name}"] for name in NORMALIZERS]
        assert shares_of_bar == pytest.approx(expected, abs=0.005)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.get_by_role("button", name="Play").click()
    page.get_by_text("epoch 3 of 3").wait_for()
    assert not page.locator("#ratios-classes").is_visible() and not page.get_by_label("Cell").is_visible()
    assert trouble == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_selected_layer_shows_its_curves_with_gaps(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """A value that is missing or not finite breaks the line and nothing else; a click on the curves goes there."""
    rows = [epoch_of(epoch) for epoch in (1, 2, 3, 4, 5)]
    rows[2][f"ratio/{LAYERS[1]}/bn"] = None
    page, trouble = look(browser, page_of_ratios(run_with(tmp_path / "run", rows)), size)
    assert page.locator(".curve").count() == 0
    page.get_by_role("button", name=LAYERS[1]).press("Enter")
    assert page.get_by_role("button", name=LAYERS[1]).get_attribute("aria-expanded") == "true"
    top = float(page.locator(".scale.up").inner_text().split()[0])
    lines = page.locator(".curve path[fill=none]").evaluate_all("all => all.map(path => path.getAttribute('d'))")
    values = [[top * (1 - float(y) / 100) for y in re.findall(r",([\d.]+)", line)] for line in lines]
    in_, ln = ([row[f"ratio/{LAYERS[1]}/{name}"] for row in rows] for name in ("in", "ln"))
    bn = [row[f"ratio/{LAYERS[1]}/bn"] for row in rows]
    assert len(values) == 4  # two lines, and the two pieces of the broken one
    for found, expected in zip(values, (in_, ln, bn[:2], bn[3:]), strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    assert page.locator(".curve path[fill-opacity]").count() == 4
    page.locator(".plot").click(position={"x": page.locator(".plot").bounding_box()["width"] * 0.52, "y": 40})
    assert page.get_by_text("epoch 3 of 5").is_visible() and "BN –" in numbers(page)[LAYERS[1]][0]
    page.get_by_role("button", name=LAYERS[1]).click()
    assert page.locator(".curve").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] and trouble == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_classes_are_compared_at_each_measured_epoch(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """Also classes from several files. A snapshot has three layers; the page says that the others are missing."""
    folder = run_with(tmp_path / "run", [epoch_of(epoch) for epoch in (1, 2)])
    rows = write_classes(folder, ["cat", "dog", "elk"])
    more = write_classes(folder, ["fox", "elk"], file="abc-0123-20")
    page, trouble = look(browser, page_of_ratios(folder), size)
    page.select_option("#ratios-set", "by class, d")
    assert [len(lines) for lines in numbers(page).values()] == [2, 2, 2, 2]  # two classes are selected at first
    page.get_by_label("cat").uncheck()
    page.get_by_label("fox").check()
    for layer, lines in numbers(page).items():
        assert lines == [said_of_class(rows, 2, layer, "dog"), said_of_class(more, 2, layer, "fox")]
    page.get_by_role("slider", name="epoch").press("Home")
    assert page.get_by_text("3 of 4 layers were recorded at epoch 1.").is_visible()
    first = numbers(page)
    assert first[LAYERS[0]][0] == said_of_class(rows, 1, LAYERS[0], "dog") and "IN –" in first[LAYERS[1]][0]
    assert page.get_by_role("button", name=LAYERS[1]).count() == 0  # one epoch is no curve
    page.get_by_role("button", name=LAYERS[3]).click()
    assert page.locator("figcaption").all_inner_texts() == ["class dog", "class fox"]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] and trouble == []


@pytest.mark.slow
def test_the_two_kinds_of_ratios_of_sn(browser: Any, tmp_path: Path) -> None:
    row = epoch_of(1, ("mean/", "var/"))
    page, trouble = look(browser, page_of_ratios(run_with(tmp_path / "run", [row])), SIZES[1])
    for name, kind in (("ratios of the mean", "mean/"), ("ratios of the variance", "var/")):
        page.select_option("#ratios-set", name)
        assert numbers(page) == {layer: [said_of(row, layer, kind)] for layer in LAYERS}
    assert not page.get_by_text("standard deviation").is_visible()
    assert trouble == []


@pytest.mark.slow
def test_one_epoch_has_no_slider_and_no_curves(browser: Any, tmp_path: Path) -> None:
    page, trouble = look(browser, page_of_ratios(run_with(tmp_path / "run", [epoch_of(1)])), SIZES[0])
    assert (
        len(numbers(page)) == 4
        and page.locator("#ratios button:visible, #ratios input[type=range]:visible").count() == 0
    )
    assert not page.get_by_label("Ratios", exact=True).is_visible() and trouble == []


@pytest.mark.slow
def test_layers_are_found_by_words_and_the_view_is_in_the_address(browser: Any, tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", [epoch_of(epoch) for epoch in (1, 2)])
    write_classes(folder, ["cat", "dog & co", "elk"])
    page, trouble = look(browser, page_of_ratios(folder), SIZES[0])
    page.get_by_label("Find layers").fill("BN2 layer1")
    assert list(numbers(page)) == ["layer1.0.bn2"]
    page.get_by_label("Find layers").fill("nothing")
    assert page.get_by_text("No layer matches.").is_visible()
    page.get_by_label("Find layers").fill("bn")
    page.select_option("#ratios-set", "by class, d")
    page.get_by_label("cat").uncheck()
    page.get_by_role("slider", name="epoch").press("Home")
    page.get_by_role("button", name="layer1.0.bn2").click()
    page.wait_for_function("location.hash.includes('layer=layer1.0.bn2')")
    again, more_trouble = look(browser, page.url, SIZES[0])
    assert numbers(again) == numbers(page) and len(numbers(again)) == 3
    assert again.locator("figcaption").all_inner_texts() == ["class dog & co"]
    assert again.get_by_text("epoch 1 of 2").is_visible() and trouble == more_trouble == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_any_name_is_shown_as_it_is(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>\"'&amp;<!--"
    long = "x" * 300
    folder = run_with(tmp_path / "run", [epoch_of(epoch, layers=(hostile, long)) for epoch in (1, 2)])
    write_classes(folder, ["cat", hostile, long], data=hostile)
    page, trouble = look(browser, page_of_ratios(folder), size)
    assert list(numbers(page)) == [hostile, long]
    page.get_by_role("button", name=hostile).click()
    page.select_option("#ratios-set", f"by class, {hostile}")
    page.get_by_role("checkbox", name=hostile).check()
    page.get_by_role("checkbox", name=long).check()
    page.get_by_role("button", name=LAYERS[0]).click()
    assert page.locator("figcaption").all_inner_texts() == ["class cat", f"class {hostile}", f"class {long}"]
    assert page.locator("#ratios img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] and trouble == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_cells_of_a_study(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """One selects a cell of the record; its numbers are those of the record, at every epoch that it has."""
    file = tmp_path / "page.html"
    file.write_text(study_page(load_study("sn-table2", "mini"), ROOT / "results", tmp_path), encoding="utf-8")
    page, trouble = look(browser, file, size)
    with (ROOT / "results" / "records" / "sn-table2.layers.csv").open(encoding="utf-8") as stream:
        record = list(csv.DictReader(stream))
    for cell, shown, kind, name in (
        ("norm=sn batch=8x2", "sn 8x2, seed 0", "var", "ratios of the variance"),
        ("norm=en batch=8x32", "en 8x32, seed 0", "lambda", None),
    ):
        page.select_option("#ratios-cell", shown)
        if name:
            page.select_option("#ratios-set", name)
        of_cell = [row for row in record if (row["scale"], row["cell"], row["kind"]) == ("mini", cell, kind)]
        epochs = sorted({int(row["epoch"]) for row in of_cell})
        for epoch in (epochs[0], epochs[-1]):
            page.get_by_role("slider", name="epoch").press("Home" if epoch == epochs[0] else "End")
            known = {layer: lines[0] for layer, lines in numbers(page).items() if "–" not in lines[0]}
            expected: dict[str, list[Row]] = {}
            for row in of_cell:
                if int(row["epoch"]) == epoch:
                    expected.setdefault(row["layer"], []).append(row)
            assert list(known) == list(expected) and len(known) == (3 if epoch == epochs[0] else 14)
            for layer, rows in expected.items():
                stds = [float(row["std"]) for row in rows] if rows[0]["std"] else None
                assert known[layer] == said([float(row["mean"]) for row in rows], stds)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] and trouble == []


def test_the_explorer_is_only_where_there_are_ratios(tmp_path: Path) -> None:
    with_ratios = run_with(tmp_path / "en", [epoch_of(1)])
    without = run_with(tmp_path / "bn", [epoch_of(1, layers=())])
    assert "ratios-data" in run_page(with_ratios) and "ratios-data" not in run_page(without)


def test_validations_after_some_steps_are_not_called_epochs(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", [epoch_of(1), epoch_of(2)], validate_every=10)
    assert '"time":"validation"' in page_of_ratios(folder).read_text() and '"time":"validation"' in run_page(folder)


def test_the_page_of_a_resnet50_is_small() -> None:
    """53 layers with six normalizers over 100 epochs, with deviations, and ten classes at three snapshots."""

    def frame(epochs: int, classes: int) -> pd.DataFrame:
        names = {"epoch": range(epochs), "layer": [f"layer3.{i}.downsample" for i in range(53)]}
        names |= {
            "class": [f"class {number}" for number in range(classes)],
            "normalizer": ["in", "ln", "bn", "gn", "brn", "ssn"],
        }
        index = pd.MultiIndex.from_product(names.values(), names=names.keys())
        draw = np.random.default_rng(0)
        return pd.DataFrame({"mean": draw.random(len(index)), "std": draw.random(len(index))}, index).reset_index()

    sets = [RatioSet("", "all images", frame(100, 1).drop(columns="class")), RatioSet("", "by class", frame(3, 10))]
    assert len(page_of("run", [explorer(sets, in_epochs=True)])) < 600_000


def test_infinite_ratios_are_missing_ones() -> None:
    """JSON has no infinity."""
    frame = pd.DataFrame(
        [(1, "bn1", "in", math.inf, math.nan), (1, "bn1", "ln", 0.25, 0.5)],
        columns=["epoch", "layer", "normalizer", "mean", "std"],
    )
    assert '"rows":[[[[null,2500,null,5000]]]]' in explorer([RatioSet("", "all images", frame)], in_epochs=True)


def test_sets_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", [epoch_of(1)])
    write_classes(folder, ["cat"])
    write_classes(folder, ["cat"], file="def-20")
    write_classes(folder, ["cat"], file="ghi-20", data="e")
    assert set(read_all_class_ratios(folder)) == {"d (abc)", "d (def)", "e"}
