"""Write the human labels of CIFAR-10N as files for `data.noise.kind=file data.noise.file=FILE`.

    python scripts/cifar10n.py CIFAR-10_human.pt FOLDER            for data=cifar10
    python scripts/cifar10n.py CIFAR-10_human.pt FOLDER --jpeg     for data=cifar10_jpeg

`CIFAR-10_human.pt` is published in github.com/UCSC-REAL/cifar-10-100n (J. Wei et al., "Learning with Noisy Labels
Revisited: A Study Using Real-World Human Annotations", ICLR 2022). FOLDER gets aggregate.csv, random1.csv, random2.csv,
random3.csv and worst.csv. Their columns are index and label, in torchvision's order of the images. With --jpeg they are
path and label: image 0007.jpg of a class is the eighth image of this class in that order.
"""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

from exnorm.data.sets.cifar10_jpeg import CLASSES

CLEAN = "clean_label"
NAMES = {  # in the published file: of the file that is written
    "aggre_label": "aggregate",
    "random_label1": "random1",
    "random_label2": "random2",
    "random_label3": "random3",
    "worse_label": "worst",
}
ARRAYS = [np.ndarray, np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.int32)), np._core.multiarray._reconstruct]


def main() -> int:
    """Read the arguments, write the files, print the share of wrong labels in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, metavar="CIFAR-10_human.pt")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--jpeg", action="store_true", help="Name images by their paths in data=cifar10_jpeg.")
    given = parser.parse_args()
    try:
        with torch.serialization.safe_globals(ARRAYS):  # nothing else of the pickle is loaded
            found = torch.load(given.published, weights_only=True)
        if not isinstance(found, dict):
            raise TypeError("it has no columns")
        labels = {name: np.asarray(found[name]).astype(int) for name in (CLEAN, *NAMES)}
        of_all = np.stack(list(labels.values()))
        if of_all.ndim != 2 or of_all.min() < 0 or of_all.max() >= len(CLASSES):
            raise ValueError("it does not have a label from 0 to 9 for each image in each column")
    except (OSError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError, RuntimeError) as problem:
        reason = str(problem).partition("\n")[0].partition(". ")[0]
        print(f"error: {given.published} is not the file of CIFAR-10N ({reason})", file=sys.stderr)
        return 1
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        print(f"error: {given.folder} cannot be made: {problem.strerror}", file=sys.stderr)
        return 1
    images = paths(labels[CLEAN]) if given.jpeg else range(len(labels[CLEAN]))
    for name, written in NAMES.items():
        rows = "".join(f"{image},{label}\n" for image, label in zip(images, labels[name], strict=True))
        (given.folder / f"{written}.csv").write_text(f"{'path' if given.jpeg else 'index'},label\n{rows}")
        wrong = 100 * np.mean(labels[name] != labels[CLEAN])
        print(f"{written}.csv: {wrong:.1f} % of {len(labels[name])} labels are wrong")
    return 0


def paths(labels: np.ndarray) -> list[str]:
    """Return the path of each image, which counts the images of its class."""
    counts = [0] * len(CLASSES)
    found = []
    for label in labels:
        found.append(f"{CLASSES[label]}/{counts[label]:04}.jpg")
        counts[label] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
