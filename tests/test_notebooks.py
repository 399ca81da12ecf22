"""The notebooks of examples/: they run without a warning, and their stored outputs are those of their code."""

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from snippet_cases import NOTEBOOKS, text_of

pytest.importorskip("nbclient", reason="needs the extra dev: pip install -e '.[dev]'")
pytest.importorskip("ipykernel", reason="needs the extra dev")

MAX_BYTES = 300_000  # of a file: what GitHub shows quickly, and what a repository can bear at each change
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
OWN_PATH = re.compile(r"(?:^|[\s'\"(=])(?:/\w+|[A-Z]:\\)", re.MULTILINE)
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
Output = tuple[str, list[str], str]


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the script of `make notebooks` as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("notebooks")


def outputs(notebook: Any) -> list[tuple[Any, Any, str]]:
    """Return the outputs of all cells: the cell, the output, and its text."""
    pairs = [(cell, output) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [(cell, output, output.get("data", {}).get("text/plain", output.get("text", ""))) for cell, output in pairs]


def structure(notebook: Any) -> dict[str, list[Output]]:
    """Return what the cells print and draw, by cell: numbers differ between machines and are left out.

    A cell with the tag `machine` prints more than numbers that differ: of its text only the number of lines counts.
    """
    found: dict[str, list[Output]] = {}
    for cell, output, text in outputs(notebook):
        kind = f"{output.output_type} {output.get('name', '')}".strip()
        words = " ".join(NUMBER.sub("#", text).split())
        if "machine" in cell.metadata.get("tags", []):
            words = f"{len(text.splitlines())} lines"
        found.setdefault(cell.id, []).append((kind, sorted(output.get("data", {})), words))
    return found


def test_there_are_notebooks() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["convert_and_train", "what_en_mixes"]


@each_notebook
def test_the_stored_outputs_are_those_of_the_stored_code(file: Path, notebooks: Any) -> None:
    """The hash of the code of their run is stored. The cells ran once, in their order, in a new process."""
    notebook = notebooks.read(file)
    hint = f"{file.name}: type `make notebooks` and commit the file"
    assert notebook.metadata.get("exnorm", {}).get("outputs_of") == notebooks.source_hash(notebook), hint
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1)), hint
    assert [cell.id for cell in ran if cell.outputs], hint


@each_notebook
def test_what_is_stored_changes_only_with_the_notebook(file: Path, notebooks: Any) -> None:
    """No times of execution and no state of an editor; names of cells that stay; and a file that is not large."""
    notebook = notebooks.read(file)
    assert notebook == notebooks.normalized(notebook, source=notebook.metadata.exnorm.outputs_of), "make notebooks"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids), ids
    assert file.stat().st_size < MAX_BYTES


@each_notebook
def test_the_stored_outputs_have_no_warning_and_no_path(file: Path, notebooks: Any) -> None:
    for cell, output, text in outputs(notebooks.read(file)):
        assert output.get("name") == "stdout" or output.output_type == "display_data", f"{cell.id}: {text}"
        assert not OWN_PATH.search(text), f"{cell.id}: {text}"


@each_notebook
def test_a_link_of_a_notebook_leads_to_a_file(file: Path) -> None:
    """As on GitHub; tests/test_docs.py follows the links of the site."""
    links = re.findall(r"\]\(([^)#]+)", text_of(file))
    assert len(links) > 1
    assert [link for link in links if not (file.parent / link).is_file()] == []


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_prints_and_draws_what_is_stored(file: Path, notebooks: Any) -> None:
    """From a clean state, in an empty folder; an exception in a cell fails. The stored files stay as they are."""
    before = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    stored = notebooks.read(file)
    assert structure(notebooks.executed(stored)) == structure(stored)
    assert {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()} == before


def small(*sources: str) -> Any:
    """Return a notebook with these cells of code."""
    from nbformat import v4

    return v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])


@pytest.mark.slow
def test_a_run_sees_an_empty_folder_and_the_exnorm_of_the_checkout(notebooks: Any) -> None:
    code = "import os, exnorm", "print(os.listdir())", "print(exnorm.__file__)"
    ran = notebooks.executed(small(*code))
    texts = [cell.outputs[0].text.strip() for cell in ran.cells if cell.outputs]
    assert texts == ["[]", str(ROOT / "exnorm" / "__init__.py")]


@pytest.mark.slow
def test_a_cell_that_fails_ends_the_run(notebooks: Any) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.executed(small("1 / 0"))


Page = Callable[[str, str], tuple[str, dict[str, bytes]]]


@pytest.fixture
def notebook_page(monkeypatch: pytest.MonkeyPatch) -> Page:
    """Return the function that makes pages of the site out of notebooks."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("notebook_page").notebook_page


@each_notebook
def test_the_page_of_a_notebook_has_all_its_text_code_outputs_and_figures(file: Path, notebook_page: Page) -> None:
    page, images = notebook_page(file.read_text(encoding="utf-8"), file.stem)
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        assert "".join(cell["source"]) in page
        for output in cell.get("outputs", []):
            assert "".join(output.get("text", [])).rstrip() in page
    assert images and all(content.startswith(b"\x89PNG") for content in images.values())
    assert re.findall(r"!\[Figure \d\]\((.*?)\)", page) == list(images)


def test_the_page_of_a_notebook_refuses_an_output_that_it_cannot_show(notebook_page: Page) -> None:
    cell = {
        "cell_type": "code",
        "source": "x",
        "outputs": [{"output_type": "display_data", "data": {"text/html": "x"}}],
    }
    with pytest.raises(ValueError, match="neither text nor a PNG"):
        notebook_page(json.dumps({"cells": [cell]}), "name")
