"""`exnorm ratios`: the table, the figures and the advice say what the metrics of a run say."""

import math
import os
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from matplotlib.figure import Figure
from page_cases import run_with

from exnorm.config.errors import UserError
from exnorm.report.palette import COLOURS
from exnorm.report.ratio_figures import dynamics, stacked
from exnorm.report.ratios import advice, per_layer, run, shares

SN = {"in": (0.5, 0.2), "ln": (0.3, 0.3), "bn": (0.2, 0.5)}
EN = {"in": (0.6, 0.1), "ln": (0.3, 0.2), "bn": (0.1, 0.05)}


def sn_rows() -> list[dict[str, float]]:
    """Two epochs of two layers; the second layer's sets of ratios are equal."""
    rows = []
    for epoch in (1, 2):
        row = {"step": epoch, "epoch": epoch, "val/top1": 50.0}
        for name, (mean, var) in SN.items():
            row |= {f"ratio/bn1/mean/{name}": mean, f"ratio/bn1/var/{name}": var if epoch == 2 else mean}
            row |= {f"ratio/layer1.0.bn1/mean/{name}": mean, f"ratio/layer1.0.bn1/var/{name}": mean}
        rows += [{"step": epoch, "epoch": epoch, "batch/loss": 1.0}, row]
    return rows


def en_rows() -> list[dict[str, float]]:
    """One epoch of one layer, with the deviation over samples."""
    ratios = {f"ratio/bn1/{name}": mean for name, (mean, _) in EN.items()}
    return [{"step": 1, "epoch": 1, **ratios, **{f"ratio/bn1/{name}/std": std for name, (_, std) in EN.items()}}]


def test_the_table_has_the_last_epoch_and_the_divergence_of_the_two_sets() -> None:
    wide = per_layer(shares(sn_rows()))
    assert list(wide.index) == ["bn1", "layer1.0.bn1"]
    assert [wide.loc["bn1", ("var", name)] for name in SN] == [var for _, var in SN.values()]
    divergence = sum((p - q) * math.log(p / q) for p, q in SN.values())
    assert wide["symmetric KL", ""].tolist() == pytest.approx([divergence, 0])


def test_ratios_that_are_zero_diverge_without_end_only_from_others() -> None:
    rows = sn_rows()
    for name, (mean, var) in {"in": (1.0, 0.0), "ln": (0.0, 1.0), "bn": (0.0, 0.0)}.items():
        rows[-1] |= {f"ratio/bn1/mean/{name}": mean, f"ratio/bn1/var/{name}": var}
        rows[-1] |= {f"ratio/layer1.0.bn1/mean/{name}": mean, f"ratio/layer1.0.bn1/var/{name}": mean}
    assert per_layer(shares(rows))["symmetric KL", ""].tolist() == [math.inf, 0]


def test_the_spread_over_samples_is_beside_the_mean() -> None:
    wide = per_layer(shares(en_rows()))
    assert wide.loc["bn1", ("std", "ln")] == 0.2 and wide.loc["bn1", ("lambda", "ln")] == 0.3


def test_a_layer_with_a_slash_in_its_name_keeps_it() -> None:
    frame = shares([{"step": 1, "epoch": 1, "ratio/a/b/in": 0.5, "ratio/a/b/in/std": 0.1, "ratio/c/d/var/bn": 0.2}])
    assert frame[["layer", "kind", "normalizer"]].to_numpy().tolist() == [["a/b", "lambda", "in"], ["c/d", "var", "bn"]]


def test_the_bars_of_a_layer_are_its_ratios_in_the_colours_of_the_normalizers() -> None:
    figure = stacked(shares(sn_rows()), "title")
    assert isinstance(figure, Figure)
    mean, var, divergence = figure.axes
    assert [text.get_text() for text in mean.get_yticklabels()] == ["bn1", "layer1.0.bn1"]
    kl = per_layer(shares(sn_rows()))["symmetric KL", ""]
    assert [bar.get_width() for bar in divergence.patches] == pytest.approx(list(kl))
    for panel, place in ((mean, 0), (var, 1)):
        bars = [container.patches[0] for container in panel.containers]
        assert [bar.get_width() for bar in bars] == pytest.approx([ratios[place] for ratios in SN.values()])
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert ends[-1] == pytest.approx(1) and ends == sorted(ends)
        assert [bar.get_facecolor() for bar in bars] == [
            container.patches[0].get_facecolor() for container in mean.containers
        ]
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_lines_of_a_layer_are_its_ratios_over_the_epochs() -> None:
    bottom, top = dynamics(shares(sn_rows()), "title").axes
    lines = {line.get_label(): line.get_ydata() for line in bottom.get_lines()}
    assert list(lines["BN var"]) == [0.2, 0.5] and list(lines["BN mean"]) == [0.2, 0.2]
    assert (bottom.get_title(), top.get_title()) == ("bn1", "layer1.0.bn1")


@pytest.mark.parametrize(("bn", "line"), [(0.31, "above 0.3: SN's authors advise"), (0.29, "moving average good")])
def test_a_large_ratio_of_bn_is_advised_batch_averages(bn: float, line: str) -> None:
    rows = [{"step": 1, "epoch": 1, **{f"ratio/bn1/{kind}/bn": bn for kind in ("mean", "var")}}]
    (found,) = advice(shares(rows), Path("RUN"))
    assert line in found and f"{bn:.2f}" in found


def test_the_command_prints_the_table_and_writes_the_figures_without_torch(tmp_path: Path, run_cli: CliRunner) -> None:
    folder = run_with(tmp_path / "run", en_rows(), "en").path
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    done = run_cli("ratios", folder, env={"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))})
    assert done.returncode == 0, done.stderr
    assert "0.600" in done.stdout and "BN's mean ratio" not in done.stdout  # the advice is about SN
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    assert figures == ["ratio_dynamics.png", "ratio_dynamics.svg", "ratios.html", "ratios.png", "ratios.svg"]


def test_a_run_without_ratios_is_told_why(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", [{"step": 1, "epoch": 1, "val/top1": 3.0}], "bn").path
    with pytest.raises(UserError, match="has no ratios: norm=bn does not mix normalizers"):
        run(folder)
