"""Images and masks in folders: `train/images/`, `train/masks/`, `val/images/`, `val/masks/`, matched by their names.

The mask of `train/images/a/b.jpg` is `train/masks/a/b.png`. Its values are the classes from 0 on, and 255 for pixels of
no class. `data.num_classes` is the number of classes; instead, `classes.txt` in the root can have a name on each line.
With list files (`data.train_list`, `data.val_list`) the files may lie anywhere: each line is `image mask`, with paths
from the root or from `train/` and `val/`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import masks, pairs
from exnorm.data.paths import file_of, root_of
from exnorm.data.splits import IGNORED, Splits

LAYOUT = "expected DIR/{train,val}/images/*.jpg and DIR/{train,val}/masks/*.png, as in data.root=DIR"
ENDS = pairs.Ends()
NAMES = "classes.txt"


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths and sizes of all images and masks, and of the classes."""
    root = root_of(config, layout=LAYOUT)
    return pairs.fingerprint_of(config, root, found(config, root, train=train), class_names(config, root))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images and masks are opened one by one."""
    root = root_of(config, layout=LAYOUT)
    names = class_names(config, root)
    values = {number: number for number in [*range(len(names)), IGNORED]}
    allowed = f"0 to {len(names) - 1}, and {IGNORED} for no class"
    return masks.splits(root, found(config, root, train=train), masks.mask_values(values, allowed=allowed), names)


def found(config: Any, root: Path, *, train: bool) -> dict[str, pairs.Pairs]:
    """Return the files of both splits, or only those of validation without `train`."""
    return pairs.of_splits({"train": "train", "val": "val"}, partial(_split, config, root), train=train)


def _split(config: Any, root: Path, split: str) -> pairs.Pairs:
    listed = config[f"{split}_list"]
    if listed is not None:
        return pairs.of_list(config, root, file_of(listed, root, f"data.{split}_list"), split)
    images = pairs.tree(root / split / "images", ENDS.image, layout=LAYOUT)
    return pairs.matched(config, root, images, pairs.tree(root / split / "masks", ENDS.mask, layout=LAYOUT), ENDS)


def class_names(config: Any, root: Path) -> list[str]:
    """Return the names in `classes.txt`, or else the numbers from 0 on.

    Raises:
        UserError: there are neither names nor a number, the two disagree, or there are too many or too few classes.
    """
    names = _listed_names(root / NAMES)
    count = config.num_classes if names is None else len(names)
    if count is None:
        raise UserError(
            f"data={config.name}: the number of classes is not known. Type data.num_classes=N, or write a name on each "
            f"line of {root / NAMES}"
        )
    if config.num_classes not in (None, count):
        raise UserError(
            f"data.num_classes={config.num_classes}, but {root / NAMES} has {count} names. Leave data.num_classes out"
        )
    if not 2 <= count <= IGNORED:
        where = f"data.num_classes={count}" if names is None else f"{root / NAMES} has {count} names"
        raise UserError(f"{where}; allowed are 2 to {IGNORED} classes, because {IGNORED} stands for no class in a mask")
    return names or [str(number) for number in range(count)]


def _listed_names(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UserError(f"{file} has the name {twice} twice")
    return names
