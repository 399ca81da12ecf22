"""ADE20K, the scene parsing benchmark: 20,210 training and 2,000 validation images in 150 classes.

B. Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017. The files are those of ADEChallengeData2016.zip:

    images/training/*.jpg, images/validation/*.jpg
    annotations/training/*.png, annotations/validation/*.png    0 is no class; 1 to 150 are the classes

The full ADE20K release has other files: it is refused. Some images are grey; they are read as RGB.
"""

from functools import partial
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.data import masks, pairs
from exnorm.data.paths import root_of
from exnorm.data.splits import IGNORED, Splits

FOLDER = "ADEChallengeData2016"
LAYOUT = "expected DIR/{images,annotations}/{training,validation}/, as in data.root=DIR"
FOLDERS = {"train": "training", "val": "validation"}
COMPLETE = {"train": 20_210, "val": 2_000}
ENDS = pairs.Ends()
# Of the names that objectInfo150.txt has for a class, the first one.
CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag""".replace("\n    ", " ").split(", ")
)  # fmt: skip
VALUES = {0: IGNORED, **{number + 1: number for number in range(len(CLASSES))}}


def fingerprint(config: Any, *, train: bool = True) -> str:
    """Return a hash of the sorted relative paths and sizes of all images and masks."""
    root = _root(config)
    return pairs.fingerprint_of(config, root, found(config, root, train=train))


def load(config: Any, *, train: bool = True) -> Splits:
    """Return both splits; images and masks are opened one by one."""
    root = _root(config)
    values = masks.mask_values(VALUES, allowed="0 for no class, and 1 to 150, as in ADEChallengeData2016")
    return masks.splits(root, found(config, root, train=train), values, CLASSES)


def found(config: Any, root: Path, *, train: bool) -> dict[str, pairs.Pairs]:
    """Return the files of both splits, or only those of validation without `train`."""
    return pairs.of_splits(FOLDERS, partial(_split, config, root), train=train)


def _split(config: Any, root: Path, folder: str) -> pairs.Pairs:
    images = pairs.tree(root / "images" / folder, ENDS.image, layout=LAYOUT)
    mask_files = pairs.tree(root / "annotations" / folder, ENDS.mask, layout=LAYOUT)
    return pairs.matched(config, root, images, mask_files, ENDS)


def _root(config: Any) -> Path:
    """Return the folder that has images/ and annotations/: the root, or ADEChallengeData2016/ in it.

    Raises:
        UserError: it is the full release.
    """
    root = root_of(config, layout=LAYOUT)
    if (root / FOLDER).is_dir():
        root = root / FOLDER
    if not (root / "annotations").is_dir():
        full = [*root.glob("index_ade20k.*"), *root.glob("images/ADE"), *root.glob("images/training/*/**/*_seg.png")]
        if full:
            raise UserError(
                f"{root} is the full ADE20K release, whose masks are in colour and have other classes. exnorm reads "
                f"the benchmark with 150 classes: {FOLDER}.zip from sceneparsing.csail.mit.edu"
            )
    return root
