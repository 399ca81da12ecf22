"""Miniatures of the data sets with masks, in the layouts in which they come; an image's red tells which mask it has."""

import functools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from data_cases import config_of
from omegaconf import OmegaConf
from PIL import Image

from exnorm.data.splits import MaskedImages

SIZE = (8, 6)  # px, width and height
CITIES = {"train": ("aachen", "ulm"), "val": ("munster",)}


def red(number: int) -> int:
    """The red of image `number`, as a JPEG can keep it."""
    return 20 + 25 * number


def save_image(path: Path, number: int, *, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Path:
    """A plain image whose red is that of its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red(number), 40, 40)).convert(mode).save(path)
    return path


def save_mask(path: Path, values: Any, *, size: tuple[int, int] = SIZE) -> Path:
    """A grey PNG of one value, or of all values of an array in its upper left corner and the first one elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = np.atleast_1d(np.asarray(values, np.uint8)).ravel()
    pixels = np.full(size[0] * size[1], listed[0], np.uint8)
    pixels[: len(listed)] = listed
    Image.fromarray(pixels.reshape(size[::-1])).save(path)
    return path


def make_segfolder(root: Path, *, train: int = 5, val: int = 3, suffix: str = ".jpg") -> Path:
    """Image n has a mask of class n modulo 3, except one pixel of no class."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            name = f"drive {number % 2}/{number}"
            save_image(root / split / "images" / f"{name}{suffix}", number)
            save_mask(root / split / "masks" / f"{name}.png", [255, *[number % 3] * 47])
    return root


def make_camvid(root: Path, *, suffix: str, lists: bool) -> Path:
    """SegNet's folders; mask n is of class n, with a pixel of void. Lists have the paths of SegNet's authors."""
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        names = [f"0016E5_{number:05}" for number in range(count)]
        for number, name in enumerate(names):
            save_image(root / split / f"{name}{suffix}", number)
            save_mask(root / f"{split}annot" / f"{name}.png", [11, *[number] * 47])
        if lists:
            lines = [f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png" for name in names]
            (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_ade20k(root: Path) -> Path:
    """The benchmark's folders. Mask n has the labels 0 and n + 1, and the last one has all of them."""
    for split, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            name = f"ADE_{split[:5]}_{number + 1:08}"
            save_image(root / "images" / split / f"{name}.jpg", number, size=(16, 12))
            labels = range(151) if number == count - 1 else [0, *[number + 1] * 191]
            save_mask(root / "annotations" / split / f"{name}.png", list(labels), size=(16, 12))
    return root


def make_cityscapes(root: Path) -> Path:
    """Both folders with what lies in them beside the masks that are read. Every mask has all labelIds."""
    number = 0
    for split, cities in {**CITIES, "test": ("berlin",)}.items():
        for city in cities:
            for frame in range(2):
                name = f"{city}_{frame:06}_000019"
                save_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", number)
                number += 1
                for kind in () if split == "test" else ("labelIds", "instanceIds", "color"):
                    save_mask(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", list(range(34)))
                (root / "gtFine" / split / city).mkdir(parents=True, exist_ok=True)
                (root / "gtFine" / split / city / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


def config_for(name: str, root: Path, *overrides: str, **values: Any) -> Any:
    """The configuration of a data set with masks."""
    return OmegaConf.merge(_composed(name, None, *overrides), {"root": str(root)}, values)


_composed = functools.cache(config_of)


def segfolder(root: Path, *overrides: str, **values: Any) -> Any:
    """The configuration of a folder of masks with three classes."""
    return config_for("segfolder", root, *overrides, **{"num_classes": 3, **values})


def mask_of(images: MaskedImages, index: int) -> np.ndarray:
    """The classes of a mask."""
    mask = images.open_mask(index)
    assert mask.mode == "L"
    return np.asarray(mask)


def number_of(images: MaskedImages, index: int) -> int:
    """The number that the red of an image tells."""
    pixel = images.open_image(index).getpixel((4, 4))
    assert isinstance(pixel, tuple)
    return round((pixel[0] - red(0)) / 25)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG with so many bits, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in values.tolist():
        text = "".join(format(value, f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
