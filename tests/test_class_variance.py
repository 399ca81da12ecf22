"""Where the variance of EN's ratios lies: against a model whose components are known, and the textbook's formula."""

import numpy as np
import pandas as pd
import pytest

from exnorm.report.class_variance import SHARES, draw_variance, sentence, variance_data, variance_shares

NAMES = ("in", "ln", "bn")


def drawn(layers: float, classes: float, images: float, *, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Ratios whose effects of layer, class and image have these deviations: by class, and each image's."""
    draw = np.random.default_rng(seed)
    of_layer = draw.normal(0, layers, (60, 1, 1, 3))
    of_class = draw.normal(0, classes, (60, 12, 1, 3))
    ratio_LCNK = 0.3 + of_layer + of_class + draw.normal(0, images, (60, 12, 9, 3))
    rows = [
        (epoch, f"l{layer}", str(label), name, 9, part[:, k].mean(), part[:, k].std())
        for epoch in (1, 2)
        for layer, of in enumerate(ratio_LCNK * (epoch == 2))
        for label, part in enumerate(of)
        for k, name in enumerate(NAMES)
    ]
    columns = ["epoch", "layer", "class", "normalizer", "images", "mean", "std"]
    return pd.DataFrame(rows, columns=columns), ratio_LCNK


@pytest.mark.parametrize(("layers", "classes", "images"), [(0.2, 0.1, 0.05), (0.05, 0.02, 0.2), (0.1, 0.0, 0.1)])
def test_the_components_are_those_of_the_model(layers: float, classes: float, images: float) -> None:
    frame, _ = drawn(layers, classes, images)
    variances = np.array([layers, classes, images]) ** 2
    found = variance_shares(frame)
    assert list(found) == list(SHARES)
    assert list(found.values()) == pytest.approx(100 * variances / variances.sum(), abs=5)
    data = variance_data(frame)
    assert data.icc.mean() == pytest.approx(classes**2 / (classes**2 + images**2), abs=0.06)
    assert data.deviation.mean() == pytest.approx(np.sqrt(3 * (classes**2 + images**2)), rel=0.1)


def test_the_intraclass_correlation_is_that_of_an_analysis_of_variance() -> None:
    """The mean squares from each image's ratios, added over the normalizers."""
    frame, ratio_LCNK = drawn(0.1, 0.1, 0.1)
    first = ratio_LCNK[0]
    classes, images, _ = first.shape
    grand = first.mean((0, 1))
    between = images * ((first.mean(1) - grand) ** 2).sum() / (classes - 1)
    within = ((first - first.mean(1, keepdims=True)) ** 2).sum() / (classes * (images - 1))
    row = variance_data(frame).set_index("layer").loc["l0"]
    assert row.icc == pytest.approx((between - within) / (between + (images - 1) * within))
    assert row.within == pytest.approx(within)


def test_a_static_mix_is_called_one() -> None:
    frame, _ = drawn(0.2, 0.0, 0.001)
    assert "In 60 of 60 layers the ratios deviate by less than 0.02 over images" in sentence(frame)
    assert (variance_data(frame).between >= 0).all()
    assert len(draw_variance(variance_data(frame), "t").axes) == 2


def test_nothing_is_said_of_one_class_or_one_image_of_each() -> None:
    frame, _ = drawn(0.2, 0.1, 0.1)
    for part in (frame[frame["class"] == "0"], frame.assign(images=1), frame[frame.layer == "l0"]):
        assert variance_shares(part) == {} and sentence(part) == ""
