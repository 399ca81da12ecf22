"""The frame of an HTML page that needs no network: its style and its script are in `page.html`."""

import html
from collections.abc import Iterable
from pathlib import Path
from string import Template

PAGE = Path(__file__).with_name("page.html")


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page whose body is these parts of HTML. The title is plain text."""
    frame = Template(PAGE.read_text(encoding="utf-8"))
    return frame.substitute(title=html.escape(title), body="\n".join(filter(None, parts)))
