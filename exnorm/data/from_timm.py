"""What timm's readers of whole data sets read: `data.source=hfds/NAME`, from Hugging Face's package `datasets`.

`data.root` is where the package keeps its files. A stream (`hfids/`, `tfds/`, `torch/`) has no image number i, so a run
could not go on where it was killed.
"""

import hashlib
from functools import partial
from typing import Any

from PIL import Image

from exnorm.config.errors import UserError
from exnorm.data import files
from exnorm.data.splits import NO_IMAGES, Images, Splits

STREAMS = ("hfids", "tfds", "torch")
SPLITS = {"train": "train", "val": "validation"}


def is_named(source: str | None) -> bool:
    """Whether a source is one of timm's; raises UserError for a stream."""
    kind = (source or "").partition("/")[0]
    if kind in STREAMS:
        raise UserError(f"data.source={source} is a stream, in which a run cannot resume; allowed: hfds/NAME, tar, wds")
    return kind == "hfds"


def fingerprint(config: Any) -> str:
    """The hash of the source's name; what the package holds is checked by the package."""
    return hashlib.sha256(config.source.encode()).hexdigest()


def load(config: Any, *, train: bool = True) -> Splits:
    """Both splits, `train` and `validation`.

    Raises:
        UserError: the package `datasets` is missing, or does not have this set.
    """
    train_reader = _reader(config, "train") if train else None
    val_reader = _reader(config, "val")
    classes = sorted(val_reader.class_to_idx, key=val_reader.class_to_idx.__getitem__)
    return Splits(_images(train_reader) if train_reader else NO_IMAGES, _images(val_reader), classes)


def _reader(config: Any, split: str) -> Any:
    from timm.data.readers import create_reader

    try:
        return create_reader(config.source, root=config.root, split=SPLITS[split])
    except ImportError:
        raise UserError(f"data.source={config.source} needs a package: pip install datasets") from None
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"data.source={config.source}, {split}: {' '.join(str(problem).split())}") from None


def _images(reader: Any) -> Images:
    return Images(list(reader.iter_targets()), partial(_open, reader))


def _open(reader: Any, index: int) -> Image.Image:
    return files.opened(f"image {index} of {reader.split}", lambda: reader[index][0])
