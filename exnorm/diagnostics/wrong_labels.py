"""`exnorm ratios RUN_DIR --wrong-labels`: do EN's ratios of a training image tell whether its label is wrong?

Equally many wrongly and correctly labelled training images of each class are measured, at the last checkpoint, without
random crops. So the class of an image says nothing of its label. For each layer, a logistic regression of the ratios is
fitted to four fifths of the images and predicts the last fifth, in turn. The AUC is the probability that it ranks a
wrongly labelled image above a correctly labelled one: 0.5 for chance. The row LOSS has the AUC of the loss on the given
label, which methods for noisy labels use, and needs no fit.

    standard error (J. A. Hanley and B. J. McNeil, "The meaning and use of the area under a ROC curve", 1982)
    s^2 = (A (1 - A) + (w - 1) (A / (2 - A) - A^2) + (r - 1) (2 A^2 / (1 + A) - A^2)) / (w r)

for w wrong and r correct labels. The interval is A ± 1.96 s.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from exnorm.analysis.ratios import read_ratios
from exnorm.config.errors import UserError
from exnorm.data import load, noise
from exnorm.data.loader import Loader, SeededImages, fixed_batches
from exnorm.data.splits import Images
from exnorm.data.transforms import eval_transform
from exnorm.engine import checkpoint
from exnorm.engine.images import bad_images_of
from exnorm.engine.worker import device_type
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.layer_ratios import LABEL_COLUMNS, LOSS, read_label_ratios

IMAGES = 100  # of each class, with wrong labels and with correct ones
FOLDS = 5
BATCH = 50
NORMAL = 1.96  # the 97.5 % quantile of the normal distribution


def measure_wrong_labels(folder: RunFolder) -> pd.DataFrame:
    """Return the AUC of each layer, of all layers together, and of the loss. It is kept and measured once.

    Returns:
        A table of layer, images, auc, low, high.

    Raises:
        UserError: the norm has no ratios of each image, the labels are not noisy or have changed since the training,
            or there is no checkpoint.
    """
    config = checkpoint.read_config(folder)
    if not noise.is_on(config.data.noise):
        raise UserError(f"{folder.path}: --wrong-labels needs a run with wrong labels. Train with data.noise.kind=...")
    last = checkpoint.find(folder, "last")
    file = folder.label_ratios_file(last["step"])
    if file.is_file():
        return read_label_ratios(file)
    splits = load(config.data)
    images, record = splits.train, folder.read_record() or {}
    assert isinstance(images, Images)
    if noise.facts(config.data.noise, images)["sha256"] != record.get("noise", {}).get("sha256"):
        raise UserError(f"{folder.path}: the labels of the data set are not those that the run was trained with")
    indices = chosen_images(images)
    device = torch.device(device_type(config.trainer.device))
    bad_images = bad_images_of(folder, config.data, splits)
    dataset = SeededImages(images, eval_transform(config.data), seed=config.seed, bad_images=bad_images)
    loader = Loader(dataset, fixed_batches(indices.tolist(), BATCH), workers=config.data.workers, device=device)
    ratios, losses, wrong = _measured(checkpoint.build_trained(config, last).to(device), loader)
    if not ratios:
        raise UserError(f"{folder.path}: --wrong-labels needs ratios of each image, and only norm=en has them")
    ratios["all layers"] = np.concatenate(list(ratios.values()), 1)
    scores = {layer: held_out_scores(ratio_NK, wrong) for layer, ratio_NK in ratios.items()} | {LOSS: losses}
    rows = [(layer, len(wrong), *auc_of(score, wrong)) for layer, score in scores.items()]
    frame = pd.DataFrame(rows, columns=list(LABEL_COLUMNS))
    write_text_atomic(file, frame.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    return read_label_ratios(file)


def chosen_images(images: Images) -> np.ndarray:
    """Return the indices of equally many wrongly and correctly labelled images of each class, evenly spaced.

    Raises:
        UserError: no class has FOLDS of both.
    """
    labels, clean = np.asarray(images.labels), np.asarray(images.clean_labels)
    found = []
    for label in np.unique(clean):
        both = [np.flatnonzero((clean == label) & ((labels != clean) == wrong)) for wrong in (True, False)]
        count = min(IMAGES, *map(len, both))
        found += [of[np.linspace(0, len(of) - 1, count).round().astype(int)] for of in both if count]
    indices = np.sort(np.concatenate(found)) if found else np.array([], int)
    if len(indices) < 2 * FOLDS:
        raise UserError(f"--wrong-labels found {len(indices) // 2} wrong labels beside as many correct ones; too few")
    return indices


@torch.no_grad()
def _measured(model: Any, loader: Loader) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return the ratios of each layer, (N, K), the loss on the given label, and whether that label is wrong."""
    ratios: dict[str, list[Tensor]] = {}
    losses, wrong = [], []
    for images, labels, clean in loader:
        for layer, found in read_ratios(model, images).items():
            if "lambda" in found:
                ratios.setdefault(layer, []).append(found["lambda"].cpu())
        losses.append(torch.nn.functional.cross_entropy(model.eval()(images).float(), labels, reduction="none").cpu())
        wrong.append((labels != clean).cpu())
    by_layer = {layer: torch.cat(parts).double().numpy() for layer, parts in ratios.items()}
    return by_layer, torch.cat(losses).double().numpy(), torch.cat(wrong).numpy()


def held_out_scores(ratio_NK: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return for each image the log odds of a wrong label, from a regression that was fitted to other images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return np.asarray(cross_val_predict(regression, ratio_NK, wrong, cv=folds, method="decision_function"))


def auc_of(score: np.ndarray, wrong: np.ndarray) -> tuple[float, float, float]:
    """Return the AUC of a score and its 95 % interval."""
    from sklearn.metrics import roc_auc_score

    area = float(roc_auc_score(wrong, score))
    w, r = int(wrong.sum()), int((~wrong).sum())
    above = (w - 1) * (area / (2 - area) - area**2) + (r - 1) * (2 * area**2 / (1 + area) - area**2)
    half = NORMAL * math.sqrt(max(0.0, area * (1 - area) + above) / (w * r))
    return area, max(0.0, area - half), min(1.0, area + half)
