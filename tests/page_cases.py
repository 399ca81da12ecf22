"""Pages in a real browser, and the files of the runs that they show."""

import json
from pathlib import Path
from typing import Any

from exnorm.runs.folder import RunFolder

PHONE, DESKTOP = (360, 740), (1280, 900)


def look(browser: Any, address: Path | str, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """The page in a window of a size, and what it complained about or asked the network for."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda problem: trouble.append(str(problem)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else trouble.append(asked.url))
    page.goto(address.as_uri() if isinstance(address, Path) else address)
    return page, trouble


def unsigned(page: Any) -> list[str]:
    """What is cut off at an edge of the window or of a box of its own without a sign of it, by its first words."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("""() => [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility())
        .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
        .filter((e) => getComputedStyle(e).overflowX !== "visible")
        .filter((e) => !e.parentElement.matches(".scrolls.right"))
        .map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 30)}`)""")


def run_with(path: Path, rows: list[dict[str, Any]], norm: str = "m", **trainer: Any) -> RunFolder:
    """The files of a run that `exnorm ratios` and the pages of a run read."""
    named = {"model": {"name": "m"}, "norm": {"name": norm}, "data": {"name": "d"}}
    path.mkdir()
    (path / "config.yaml").write_text(json.dumps({**named, "batch": "1x8", "seed": 0, "trainer": trainer}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(path)
