"""`exnorm report`: pages that stand alone, seen in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, CliRunner
from engine_cases import make_image_folder, tiny, train

from exnorm.config.study import load_study
from exnorm.report.html_report import run_page, study_page
from exnorm.runs.folder import RunFolder
from exnorm.runs.records import change_records

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP = (390, 800), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: make browser installs it where apt-get is")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def look(browser: Any, path: Path, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """The page in a window of a size, and what it complained about or asked the network for."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda problem: trouble.append(str(problem)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else trouble.append(asked.url))
    page.goto(path.as_uri())
    return page, trouble


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_of_a_study_in_a_browser(browser: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """No errors, no network, nothing wider than the window; filter, sorting, figures and links work."""
    path = tmp_path / "study.html"
    path.write_text(study_page(load_study("sn-table2", "mini"), ROOT / "results", tmp_path), encoding="utf-8")
    page, trouble = look(browser, path, size)
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

    page.locator("#cells tbody a").first.click()
    opened = page.locator("#runs > details[open]")
    opened.first.wait_for()  # the page opens it when it hears of the new address
    assert opened.count() == 1 and "exnorm train" in opened.inner_text()
    assert trouble == []


@pytest.mark.slow
def test_the_page_of_a_run_in_a_browser(browser: Any, tmp_path: Path, run_cli: CliRunner) -> None:
    """Its result, ratios, configuration and provenance; also before it has finished."""
    run = train(tiny(make_image_folder(tmp_path / "data"), "norm=sn"), tmp_path)
    done = run_cli("report", str(run))
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html")
    page, trouble = look(browser, run / "report.html", PHONE)
    assert page.locator("figure[data-name]").count() == 2
    page.get_by_text("provenance").click()
    assert "config_hash" in page.locator("details[open]").inner_text()
    (run / "record.json").unlink()
    assert "It has not finished." in run_page(RunFolder(run)) and trouble == []


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


def test_a_folder_that_is_no_run_and_a_study_without_a_record_are_one_line(tmp_path: Path, run_cli: CliRunner) -> None:
    for what, said in ((str(tmp_path), "is no run folder"), ("en-pi", "nothing was measured of en-pi")):
        done = run_cli("report", what)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
