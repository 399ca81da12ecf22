"""What the documentation site has: a hook of MkDocs, which mkdocs.yml names.

The site mirrors the repository: `docs/data.md` becomes `docs/data.html` and `README.md` becomes `index.html`. So the
links between these files are the same on both. The page of the settings is generated (`settings_page.py`), and so are
those of the notebooks (`notebook_page.py`): `examples/*.ipynb` becomes a page and image files.
"""

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from notebook_page import notebook_page
from settings_page import settings_page

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_OF_DOCS = (
    "README.md",
    "CHANGELOG.md",
    "examples/*/README.md",
    "examples/*.py",
    "examples/*.ipynb",
    "results/README.md",
    "results/faults.csv",
    "results/bench/*",
    "results/figures/*.png",
    "results/sheets/*",
    "results/tables/*",
)
SETTINGS = "docs/reference/settings.md"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[#)])")
ITEM = re.compile(r" *([*+-]|\d+\.) ")


def on_files(files: "Files", config: Any) -> "Files":
    """Return the files of the site, under their paths in the repository."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    docs = sorted(file for file in Path(config.docs_dir).rglob("*") if file.is_file())
    others = [file for pattern in OUTSIDE_OF_DOCS for file in sorted(ROOT.glob(pattern))]
    for path in [*docs, *others]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, SETTINGS, content=settings_page()))
    for path in sorted(ROOT.glob("examples/*.ipynb")):
        page, images = notebook_page(path.read_text(encoding="utf-8"), path.stem)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
        for name, content in images.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: "Files") -> str:
    """Return the text of a page as Python-Markdown needs it; GitHub is less strict."""
    return with_pages(with_lines_before_lists(markdown), page.file.src_uri)


def with_lines_before_lists(markdown: str) -> str:
    """Insert the empty line without which Python-Markdown takes a list after a paragraph for its text."""
    lines: list[str] = []
    fenced = False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        before = lines[-1] if lines else ""
        begins = ITEM.match(line) and not line.startswith("    ") and not fenced
        if begins and before.strip() and not ITEM.match(before) and not before.startswith((" ", "#")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def with_pages(markdown: str, name: str) -> str:
    """Let a link to a folder lead to the README.md in it, as on GitHub, and a link to a notebook to its page."""
    here = ROOT / PurePosixPath(name).parent

    def page_of(found: re.Match[str]) -> str:
        if found[1].endswith(".ipynb"):
            return f"{found[1].removesuffix('.ipynb')}.md"
        is_folder = (here / found[1] / "README.md").is_file()
        return f"{found[1].rstrip('/')}/README.md" if is_folder else found[1]

    return LINK.sub(page_of, markdown)
