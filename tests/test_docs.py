"""The documentation site: it builds without a warning, needs no network, and its references are complete."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from snippet_cases import NOTEBOOKS

import exnorm
from exnorm.config.explain import known_values
from exnorm.config.groups import group_options
from exnorm.config.options import UNTYPED

pytest.importorskip("mkdocs", reason="needs the extra docs: pip install -e '.[docs]'")
pytest.importorskip("material", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Page(HTMLParser):
    """The addresses in a page: what a browser loads at once, and what a click leads to; and the text of paragraphs."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.classes: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of a tag."""
        values = {key: value or "" for key, value in attrs}
        self.classes |= set(values.get("class", "").split())
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built as `make docs` and `make check` build it. With --quiet, --strict would find nothing."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Return the pages of the site, except the one for addresses that do not exist."""
    return {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


def is_elsewhere(address: str) -> bool:
    """Return whether an address is not one of the site."""
    return bool(urlsplit(address).scheme or urlsplit(address).netloc)


def test_a_page_loads_nothing_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    """No fonts, scripts, styles or images. The theme's script loads Mermaid, which no page has."""
    assert len(pages) > 12
    for file, page in pages.items():
        assert page.loaded and not [address for address in page.loaded if is_elsewhere(address)], file
        assert "mermaid" not in page.classes, file
    for file in site.rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", file.read_text(encoding="utf-8")), file


def test_every_link_leads_to_a_file_of_the_site(site: Path, pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for address in filter(None, [*page.links, *page.loaded]):
            if not is_elsewhere(address) and urlsplit(address).path:
                target = (file.parent / unquote(urlsplit(address).path)).resolve()
                assert target.is_file() and target.is_relative_to(site.resolve()), f"{file}: {address}"


def test_a_notebook_is_a_page_with_its_figures_and_links_lead_there(pages: dict[Path, Page]) -> None:
    """In the repository these links lead to the file, which the site only offers for download on the page itself."""
    links = {file: {PurePosixPath(urlsplit(link).path).name for link in page.links} for file, page in pages.items()}
    for notebook in NOTEBOOKS:
        (own,) = [file for file in pages if file.name == f"{notebook.stem}.html"]
        figures = {name for name in pages[own].loaded if name.startswith(notebook.stem)}
        assert figures and all((own.parent / name).is_file() for name in figures)
        assert [file for file, found in links.items() if notebook.name in found] == [own]


def test_what_is_a_list_in_the_files_is_one_on_the_site(pages: dict[Path, Page]) -> None:
    """Python-Markdown takes a list after a paragraph for text, where GitHub begins a list."""
    for file in pages:
        paragraphs = re.findall(r"<p>(.*?)</p>", file.read_text(encoding="utf-8"), re.DOTALL)
        assert not [text for text in paragraphs if re.search(r"^\s*([*-]|\d+\.) ", text, re.MULTILINE)], file


def test_the_reference_of_python_has_every_public_name(site: Path) -> None:
    page = (site / "docs" / "reference" / "python.html").read_text(encoding="utf-8")
    names = [f"exnorm.{name}" for name in exnorm.__all__]
    names += [f"exnorm.{room}.{name}" for room in ("norms", "testing") for name in getattr(exnorm, room).__all__]
    names += [f"exnorm.ops.{name}" for name in ("set_backend", "get_backend", "using_backend")]
    for name in names:
        assert f">{name}</" in page, f"{name} is missing: add ::: {name} to docs/reference/python.md"


def rows_of_settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the rows of the page of settings, by their keys. An option of a group has rows of its own."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from settings_page import settings_page

    found = {}
    for line in settings_page().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and (key := re.fullmatch(r"`([\w.]+)`", cells[0])):
            found[key[1]] = cells[1:]
    return found


def test_the_reference_of_settings_has_every_key_with_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment behind a key in the schema or in the YAML file is its meaning."""
    rows = rows_of_settings(monkeypatch)
    hidden = {f"{group}.{key}" for group in UNTYPED for key in ("name", "_target_")}
    known = {*known_values("train"), *(key for key in known_values("eval") if not key.startswith("data."))} - hidden
    assert known - set(rows) == set()
    assert set(rows) - known == {*UNTYPED, "model", "data", "optim", "trainer", "logger", "debug"}
    assert [key for key, cells in rows.items() if not all(cells)] == []


def test_the_reference_of_settings_has_the_defaults_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_settings(monkeypatch)
    shown = ("trainer.precision", "optim.lr", "logger.wandb", "trainer.epochs", "batch", "norm.pi", "data.roots")
    assert {key: tuple(rows[key][:2]) for key in shown} == {
        "trainer.precision": ("text", "`fp32`"),
        "optim.lr": ("number, or null", "`null`"),
        "logger.wandb": ("text", "`offline`"),
        "trainer.epochs": ("integer", "that of `data.epochs`"),
        "batch": ("text", "`1x32`"),
        "norm.pi": ("integer", "`50`"),
        "data.roots": ("text, or null", "the environment variable `EXNORM_DATA`"),
    }


def test_the_reference_of_settings_has_every_option_of_a_group(site: Path) -> None:
    page = (site / "docs" / "reference" / "settings.html").read_text(encoding="utf-8")
    for group in ("model", "data", "optim", "trainer", "logger", "debug"):
        assert [name for name in group_options(group) if f"<code>{name}</code>" not in page] == []
    for group in UNTYPED:
        assert [name for name in group_options(group) if f"{group}={name}" not in page] == []
