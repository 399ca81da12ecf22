"""Miniatures of ImageNet, WebVision and CIFAR in the layouts in which they come; an image's colour is its class."""

import hashlib
import pickle
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from omegaconf import OmegaConf
from PIL import Image

from exnorm.config.compose import compose_train
from exnorm.data.splits import Images

# Sorted, as ImageNet's labels are; and the order that the miniature of WebVision has.
WNIDS = ("n01440764", "n01443537", "n15075141")
PLACES = {"n01440764": 0, "n01443537": 1, "n15075141": 999}  # among all thousand
COLOURS = {"n01440764": (250, 10, 10), "n01443537": (10, 250, 10), "n15075141": (10, 10, 250)}
WEBVISION_ORDER = ("n15075141", "n01440764", "n01443537")
# Several queries have the same class.
QUERIES = {"q0001": "n15075141", "q0002": "n01440764", "q0003": "n01443537", "q0004": "n01440764"}
SMALL = ("data.image_size=32", "data.resize=32", "data.workers=0")


def config_of(name: str, root: Path | None = None, *overrides: str, **values: Any) -> Any:
    """The configuration of a data set with small crops."""
    config = compose_train([f"data={name}", *SMALL, *overrides]).data
    return OmegaConf.merge(config, {} if root is None else {"root": str(root)}, values)


def save(path: Path, wnid: str, size: tuple[int, int] = (24, 20)) -> Path:
    """A JPEG or PNG of the colour of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[wnid]).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def make_imagenet(root: Path, *, train: int = 6, val: int = 4) -> Path:
    """train/<wnid>/ and val/<wnid>/."""
    for wnid in WNIDS:
        for index in range(train):
            save(root / "train" / wnid / f"{wnid}_{index}.JPEG", wnid)
    for index in range(val * len(WNIDS)):
        wnid = WNIDS[index * 2 % len(WNIDS)]
        save(root / "val" / wnid / f"ILSVRC2012_val_{index + 1:08}.JPEG", wnid)
    return root


def flatten_val(root: Path) -> dict[str, str]:
    """Move the images of val/<wnid>/ to val/ itself, as they come in the tar file; the class of each."""
    found = {file.name: file.parent.name for file in sorted((root / "val").glob("*/*"))}
    for file in list((root / "val").glob("*/*")):
        file.rename(root / "val" / file.name)
    for folder in list((root / "val").iterdir()):
        if folder.is_dir():
            folder.rmdir()
    return dict(sorted(found.items()))


def make_webvision(root: Path, *, train: int = 4, val: int = 3) -> Path:
    """info/, google/, flickr/ and val_images_256/, with WebVision's quirks."""
    lists: dict[str, list[str]] = {"google": [], "flickr": []}
    for query, wnid in QUERIES.items():
        for origin, lines in lists.items():
            for index in range(train):
                name = f"{origin}/{query}/{index}.{'png' if index % 2 else 'jpg'}"
                save(root / name, wnid)
                lines.append(f"{name} {WEBVISION_ORDER.index(wnid)}")
    info = root / "info"
    info.mkdir(parents=True)
    for origin, lines in {**lists, "all": lists["google"] + lists["flickr"]}.items():
        (info / f"train_filelist_{origin}.txt").write_text("\n".join(lines) + "\n")
    names = {f"val{index:06}.jpg": WEBVISION_ORDER[index % 3] for index in range(3 * val)}
    for name, wnid in names.items():
        save(root / "val_images_256" / name, wnid)
    (info / "val_filelist.txt").write_text(
        "".join(f"{name} {WEBVISION_ORDER.index(wnid)}\n" for name, wnid in names.items())
    )
    (info / "synsets.txt").write_text("".join(f"{wnid} some words, others\n" for wnid in WEBVISION_ORDER))
    (info / "queries_synsets_map.txt").write_text(
        "".join(f"{int(query[1:])} {WEBVISION_ORDER.index(wnid) + 1}\n" for query, wnid in QUERIES.items())
    )
    return root


def make_class_tars(root: Path, folders: Path) -> Path:
    """train.tar and val/<wnid>.tar with the images of class folders, the latter as `tar -C folder .` names them."""
    (root / "val").mkdir(parents=True)
    with tarfile.open(root / "train.tar", "w") as tar:
        for file in sorted((folders / "train").glob("*/*")):
            tar.add(file, f"{file.parent.name}/{file.name}")
    for folder in sorted((folders / "val").iterdir()):
        with tarfile.open(root / "val" / f"{folder.name}.tar", "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, f"./{file.name}")
    return root


def make_shards(root: Path, folders: Path, places: dict[str, int] = PLACES) -> Path:
    """WebDataset's shards as timm's on the hub: the label of `key.jpg` stands in `key.cls`."""
    root.mkdir(parents=True)
    for split, name in (("train", "imagenet1k-train"), ("val", "imagenet1k-validation")):
        files = sorted((folders / split).glob("*/*"), key=lambda file: file.name[::-1])
        for number in range(2):
            with tarfile.open(root / f"{name}-{number:04}.tar", "w") as tar:
                for file in files[number::2]:
                    tar.add(file, f"{file.stem}.jpg")
                    label = str(places[file.parent.name]).encode()
                    info = tarfile.TarInfo(f"{file.stem}.cls")
                    info.size = len(label)
                    tar.addfile(info, BytesIO(label))
    return root


def make_cifar10(root: Path, each: int = 4) -> Path:
    """The python version of CIFAR-10's archive, with few images; the red of an image is ten times its label."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    labels = [index % 10 for index in range(10 * each)]
    pixels = np.zeros((len(labels), 3, 32, 32), np.uint8)
    pixels[:, 0] = np.array(labels)[:, None, None] * 10
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": pixels.reshape(len(labels), -1), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {label}" for label in range(10)]}))
    return root


def accept_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torchvision take the miniature for the archive, whose hashes it checks."""
    files = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in (root / "cifar-10-batches-py").iterdir()}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, files[name]] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, files[name]] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": files["batches.meta"]})


def class_of(images: Images, index: int) -> str:
    """The class whose colour an image has."""
    pixel = images.open_image(index).getpixel((10, 10))
    assert isinstance(pixel, tuple)
    return min(COLOURS, key=lambda wnid: sum(abs(a - b) for a, b in zip(COLOURS[wnid], pixel, strict=True)))


def labelled_right(images: Images, classes: list[str] | tuple[str, ...]) -> bool:
    """Whether the label of each image is its own class."""
    return all(classes[images.labels[index]] == class_of(images, index) for index in range(len(images)))


def odd_exif() -> bytes:
    """A good JPEG whose EXIF block is cut off, which Pillow warns of each time."""
    stream = BytesIO()
    Image.new("RGB", (20, 18), (200, 30, 90)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    after = 4 + struct.unpack(">H", jpeg[4:6])[0]  # Pillow looks into EXIF only where the JFIF block is not there
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 40) + b"\x12\x01\x03\0"
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[after:]
