"""A folder of images in ImageNet's layout: `train/<class>/<image>` and `val/<class>/<image>`.

Classes are the sorted names of the folders in `train/`; those of `val/` must be among them.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data.splits import Images, Splits

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
LAYOUT = "expected DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, as in data.root=DIR"


def fingerprint(config: Any) -> str:
    """The hash of the sorted relative paths and sizes of all images."""
    root = _root(config)
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for name, files in _scan(root / split):
            digest.update(f"{split}/{name}\n".encode(errors="surrogateescape"))
            for file in files:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def load(config: Any) -> Splits:
    """List both splits; images are opened one by one."""
    root = _root(config)
    train, val = list(_scan(root / "train")), list(_scan(root / "val"))
    classes = [name for name, _ in train]
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name, _ in val if name not in label_of]
    if unknown:
        raise UserError(f"{root}/val has a class that train lacks: {unknown[0]} ({len(unknown)} in all)")
    return Splits(_images(train, label_of), _images(val, label_of), classes)


def _root(config: Any) -> Path:
    if config.root is None:
        raise UserError(f"data={config.name} needs a folder: {LAYOUT}")
    root = Path(config.root).expanduser()
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise UserError(f"data.root={config.root}: there is no folder {folder}; {LAYOUT}")
    return root


def _scan(split: Path) -> Iterator[tuple[str, list[Path]]]:
    """Each class of a split with its sorted images."""
    names = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{split} has no class folders; {LAYOUT}")
    for name in names:
        files = sorted(_files(split / name))
        if not files:
            raise UserError(f"class folder {split / name} has no images ({', '.join(SUFFIXES)}); remove it or fill it")
        yield name, files


def _files(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            yield Path(entry.path)


def _images(split: list[tuple[str, list[Path]]], label_of: dict[str, int]) -> Images:
    paths = [str(file) for _, files in split for file in files]
    labels = [label_of[name] for name, files in split for _ in files]
    return Images(labels, partial(_open, paths))


def _open(paths: list[str], index: int) -> Image.Image:
    try:
        with Image.open(paths[index]) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as problem:
        raise UserError(f"{paths[index]} is no readable image ({problem}); mend or remove it") from None
