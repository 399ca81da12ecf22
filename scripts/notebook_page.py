"""A notebook as a page of the site: Markdown and image files. A notebook is JSON, so this needs no converter."""

import base64
import json
from typing import Any


def notebook_page(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of a notebook, and the images in it by their file names.

    Args:
        text: the content of the `.ipynb` file.
        name: the file's name without its suffix. The images are called `<name>-1.png` and so on.
    """
    images: dict[str, bytes] = {}
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(fenced(source, "python"))
            parts += [shown(output, name, images) for output in cell["outputs"]]
    # HTML, because the same link in Markdown leads to this page.
    parts.insert(1, f'This page is a notebook. <a href="{name}.ipynb" download>Download it</a> to run it yourself.')
    return "\n\n".join(parts) + "\n", images


def shown(output: dict[str, Any], name: str, images: dict[str, bytes]) -> str:
    """Return an output of a cell. A figure is added to the images.

    Raises:
        ValueError: the output is neither text nor a PNG image.
    """
    data = output.get("data", {"text/plain": output.get("text")})
    if "image/png" in data:
        file = f"{name}-{len(images) + 1}.png"
        images[file] = base64.b64decode("".join(data["image/png"]))
        return f"![Figure {len(images)}]({file})"
    if data.get("text/plain") is None:
        raise ValueError(f"{name}.ipynb: an output is neither text nor a PNG image. Print it, or draw it.")
    return fenced("".join(data["text/plain"]), "text")


def fenced(text: str, language: str) -> str:
    """Return a block of code."""
    return f"```{language}\n{text.rstrip()}\n```"
