"""`exnorm report`: pages that stand alone, seen in a real browser."""

import base64
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, CliRunner
from engine_cases import make_image_folder, tiny, train_here
from page_cases import DESKTOP, PHONE, look, run_with, unsigned

from exnorm.config.metrics import metrics_of
from exnorm.config.study import load_study
from exnorm.report.html_report import run_page, study_page
from exnorm.report.run_figures import curves
from exnorm.report.study_table import StudyTable, as_html
from exnorm.runs.folder import RunFolder
from exnorm.runs.records import change_records


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The page of a study at scale mini, by its name, from this checkout's records; written once."""
    folder = tmp_path_factory.mktemp("studies")

    @functools.cache
    def write(name: str) -> Path:
        path = folder / f"{name}.html"
        path.write_text(study_page(load_study(name, "mini"), ROOT / "results", folder), encoding="utf-8")
        return path

    return write


def smallest_letters(page: Any, image: Any) -> float:
    """The height in px that the smallest text of a figure has in the window."""
    source = base64.b64decode(image.get_attribute("src").partition(",")[2]).decode()
    points = min(float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", source))
    whole = float(re.search(r'viewBox="0 0 ([\d.]+)', source)[1])  # type: ignore[index]
    return points * image.evaluate("image => image.clientWidth") / whole


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_of_a_study_in_a_browser(
    browser: Any, size: tuple[int, int], study_file: Callable[[str], Path]
) -> None:
    """No errors, no network, nothing wider than the window; filter, sorting, figures and links work."""
    page, trouble = look(browser, study_file("sn-table2"), size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    rows = page.locator("#cells tbody tr:visible")
    assert rows.count() == 36

    page.fill("#filter", "SN 8x2")
    assert rows.count() == 1 and "8x2" in rows.first.inner_text()
    assert page.locator("#runs > details:visible").count() == 1
    page.fill("#filter", "")
    assert rows.count() == 36

    scores = page.locator("#cells tbody td:nth-child(3)")
    head = page.locator("#cells th").nth(2)
    for rising in (False, True):
        head.click()
        values = [float(text.split()[0]) for text in scores.all_inner_texts()]
        assert values == sorted(values, reverse=not rising) and len(set(values)) > 10

    figures = page.locator("figure[data-name]:visible")
    assert figures.count() == 1
    page.select_option("#chosen", "curves")
    assert figures.count() == 1 and figures.first.get_attribute("data-name") == "curves"
    assert figures.locator("img").evaluate("image => image.naturalWidth") > 100

    assert unsigned(page) == []
    page.locator("#cells tbody a").first.click()
    opened = page.locator("#runs > details[open]")
    opened.first.wait_for()  # the page opens it when it hears of the new address
    assert opened.count() == 1 and "exnorm train" in opened.inner_text() and unsigned(page) == []
    assert trouble == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sn-table2", "en-imagenet", "en-transfer"])
def test_verdicts_are_seen_without_scrolling_and_what_is_cut_off_says_so(
    browser: Any, name: str, study_file: Callable[[str], Path]
) -> None:
    """Also on a phone; there the rest of the table is reached by scrolling, until the sign goes."""
    for size in (DESKTOP, PHONE):
        page, trouble = look(browser, study_file(name), size)
        table = page.locator("#verdicts table")
        place = table.locator("th").all_inner_texts().index("verdict")
        edges = table.locator(f"td:nth-child({place + 1})").evaluate_all(
            "cells => cells.filter(cell => cell.textContent).map(cell => cell.getBoundingClientRect().right)"
        )
        assert edges and max(edges) <= size[0]
        assert unsigned(page) == [] and trouble == []
    assert page.locator("#verdicts .scrolls.right").count() == 1
    page.locator("#verdicts .scroller").evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    page.locator("#verdicts .scrolls.left:not(.right)").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_figures_of_a_study_can_be_read_in_any_window(
    browser: Any, size: tuple[int, int], study_file: Callable[[str], Path]
) -> None:
    page, _ = look(browser, study_file("en-transfer"), size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    names = page.locator("#chosen option").all_inner_texts()
    for name in names:
        page.select_option("#chosen", name)
        assert smallest_letters(page, page.locator("figure[data-name]:visible img")) >= 7.9, name
    assert len(names) > 5


@pytest.mark.slow
def test_the_page_of_a_run_in_a_browser(browser: Any, tmp_path: Path, cli_here: CliRunner) -> None:
    """Its result, ratios, configuration and provenance; also before it has finished."""
    run = train_here(tiny(make_image_folder(tmp_path / "data"), "norm=sn"), tmp_path)
    done = cli_here("report", run)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html")
    page, trouble = look(browser, run / "report.html", PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0] and unsigned(page) == []
    assert page.locator(".panels img").count() == 3
    assert page.locator("figure[data-name]").count() == 2
    for name in page.locator("#chosen option").all_inner_texts():
        page.select_option("#chosen", name)
        image = page.locator("figure[data-name]:visible img")
        assert smallest_letters(page, image) >= 9 and image.evaluate("image => image.clientWidth") <= PHONE[0]
    page.get_by_text("provenance").click()
    assert "config_hash" in page.locator("details[open]").inner_text()
    (run / "record.json").unlink()
    assert "It has not finished." in run_page(RunFolder(run)) and trouble == []


def ended(epoch: int, top1: float, **more: Any) -> dict[str, Any]:
    """The row at the end of an epoch of ten steps."""
    numbers = {"train/loss": 1.0 / epoch, "val/loss": 2.0 / epoch, "train/top1": 60.0 + epoch, "lr": 0.1}
    return {"step": 10 * epoch, "epoch": epoch, **numbers, "val/top1": top1, **more}


def test_the_curves_of_a_run_are_its_metrics_and_name_the_first_best_epoch(tmp_path: Path) -> None:
    """The rate also inside of epochs; each validation set has a line; a loss that is not finite is a gap."""
    inside = {"step": 15, "epoch": 2, "batch/loss": 1.0, "lr": 0.05}
    last = ended(3, 50.0, **{"val/b/top1": 12.0, "val/loss": None})
    log = [ended(1, 40.0), inside, ended(2, 50.0), last]
    figures = dict(curves(log, metrics_of({})[0]))
    (loss,), (top1,), (rate,) = (figures[name]().axes for name in ("loss", "top-1 %", "learning rate"))
    drawn = [{line.get_label(): list(line.get_ydata()) for line in panel.get_lines()} for panel in (loss, top1)]
    assert drawn[0]["training"] == [1.0, 1 / 2, 1 / 3]
    assert drawn[0]["validation"][:2] == [2.0, 1.0] and math.isnan(drawn[0]["validation"][2])
    assert drawn[1]["validation"] == [40.0, 50.0, 50.0] and drawn[1]["b"][2] == 12.0
    best, line = rate.get_lines()
    assert list(best.get_xdata()) == [2, 2] and best.get_label() == "best epoch, 2"
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 1.5, 2, 3], [0.1, 0.05, 0.1, 0.1])
    text = run_page(run_with(tmp_path / "run", log))
    assert "Best epoch: 2, with a validation top-1 of 50.00 %. Last epoch: 3, with 50.00 %." in text


def test_a_run_before_its_first_validation_has_a_page(tmp_path: Path) -> None:
    assert "No epoch has ended yet." in run_page(run_with(tmp_path / "run", [{"step": 5, "epoch": 1, "lr": 0.1}]))


def test_what_a_study_is_called_cannot_become_a_part_of_its_table(tmp_path: Path) -> None:
    """The caption of a table in HTML is text, as its cells are."""
    file = tmp_path / "mine.yaml"
    file.write_text("axes: {norm: [bn, en], <i>a</i>: {b: [batch=8x32]}}\ncolumns: <i>a</i>\n")
    table = StudyTable(load_study(str(file), "mini"), [])
    assert table.caption().endswith("<i>a</i>") and "<i>a" not in as_html(table)


def test_what_a_record_holds_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    """Texts of files are shown as they are."""
    usual = {"scale": "mini", "seed": "0", "hours": "0.1", "uncommitted": "no", "facts": "", "torch": "<b>2</b>"}
    row = {
        **usual,
        **dict.fromkeys(("commit", "config_hash"), "x"),
        **{"cell": "norm=bn batch=8x2", "metric": "top1", "value": "50", "device": "<script>x</script>", "run": "*"},
    }
    change_records(tmp_path, "sn-table2", lambda before: {**before, "runs": [row]})
    text = study_page(load_study("sn-table2", "mini"), tmp_path, tmp_path)
    assert "<script>x" not in text and "&lt;script&gt;x" in text and "<b>2" not in text


def test_a_folder_that_is_no_run_and_a_study_without_a_record_are_one_line(tmp_path: Path, cli_here: CliRunner) -> None:
    for what, said in ((str(tmp_path), "is not a run folder"), ("en-pi", "nothing was measured of en-pi")):
        done = cli_here("report", what)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
