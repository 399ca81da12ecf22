"""The seam between a task and the rest: any task trains, and no other code knows its metrics by name."""

import functools
import hashlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from engine_cases import WAIT_S, make_image_folder, metrics, start, tiny, train

from exnorm.config.compose import compose_train, default_values
from exnorm.config.groups import group_options
from exnorm.config.metrics import Metric, metrics_of
from exnorm.config.study import load_study
from exnorm.config.study_file import SCALES, has_scale
from exnorm.engine.launch import identity
from exnorm.runs.listing import list_runs
from exnorm.studies.plan import SOURCE

# Files that may name a metric of classification, and why.
NAMED = {
    "exnorm/tasks/classification.py": "computes it",
    "exnorm/runs/records.py": "an example in a comment",
}
SETTINGS = Path(__file__).with_name("settings_of_studies.json")


def test_no_code_outside_of_its_task_names_a_metric() -> None:
    """Reports, listings, studies and the engine work for a task that somebody adds."""
    names = {metric.name for metric in metrics_of({})} - {"loss"}
    assert names == {"top1", "top5"}
    found = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "exnorm").rglob("*.py")
        if re.search("|".join(names), file.read_text(encoding="utf-8"))
    }
    assert found == set(NAMED)


def settings_hashes() -> dict[str, str]:
    """A hash of the settings of each cell and source, at each scale, without the data, which may be missing."""
    found = {}
    for name in group_options("study"):
        for scale in (scale for scale in SCALES if has_scale(name, scale)):
            study = load_study(name, scale)
            cells = {cell.name: (cell.train, cell.evaluate) for cell in study.cells}
            cells |= {f"source {source}": (settings, ()) for source, settings in study.sources.items()}
            for cell, (settings, evaluated) in cells.items():
                words = [SOURCE.sub("checkpoint", text) for text in settings]
                text = json.dumps([_counted(tuple(words)), evaluated])
                found[f"{name}/{scale}/{cell}"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


@functools.cache  # cells of different studies are often the same runs
def _counted(words: tuple[str, ...]) -> str:
    """The hash of a run with these settings, on data without a fingerprint."""
    from omegaconf import OmegaConf

    from exnorm.runs.identity import config_hash

    values: Any = OmegaConf.to_container(compose_train(list(words)), resolve=True)
    defaults = default_values(values["norm"]["name"], values["task"]["name"])
    return config_hash(values, defaults=defaults, fingerprint="")


@pytest.mark.slow
def test_the_runs_of_committed_studies_keep_their_hashes() -> None:
    """A new option, or a moved default, must not orphan the runs behind the committed results."""
    pinned = json.loads(SETTINGS.read_text(encoding="utf-8"))
    found = settings_hashes()
    assert {key: found.get(key) for key in pinned} == pinned


def test_a_configuration_from_before_tasks_had_metrics_is_classification() -> None:
    """Old run folders stay readable."""
    old = {"task": {"name": "classification", "label_smoothing": 0.0}}
    assert [metric.name for metric in metrics_of(old)] == [metric.name for metric in metrics_of({})]
    assert metrics_of(old)[0] == Metric("top1", "top-1", "%", 2, larger_is_better=True)


TOY = """
    from exnorm.tasks.classification import Classification

    class Toy(Classification):
        has_rows = True

        def rows(self, output, targets):
            return output.float().logsumexp(1) - output.float().gather(1, targets[0][:, None])[:, 0]

        def summarize_rows(self, rows):
            return {"median_loss": float(rows.median()), "first_loss": float(rows[0]), "rows": len(rows)}
"""
TOY_METRICS = "[{name: median_loss, label: median loss, unit: '', digits: 3, larger_is_better: false}]"


def toy(images: Path, *more: str) -> list[str]:
    """Arguments of a training with a task of one's own."""
    return tiny(images, "task._target_=toy.Toy", f"task.metrics={TOY_METRICS}", *more)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny data set, and the module of the toy task where Python finds it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "toy.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return make_image_folder(tmp_path / "images")


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored_by_its_own_metrics(images: Path, tmp_path: Path) -> None:
    """Also by one that does not add up: the median over all samples, on any number of processes."""
    one = train(toy(images, "batch=2x4"), tmp_path / "one")
    record = json.loads((one / "record.json").read_text())
    assert [metric["name"] for metric in record["metrics"]] == ["median_loss"] and record["val/rows"] == 21
    rows = [row for row in metrics(one) if "val/median_loss" in row]
    assert record["best"]["val/median_loss"] == min(row["val/median_loss"] for row in rows)
    (run,) = list_runs(tmp_path / "one" / "runs")
    assert (run.metric, run.value) == ("median loss", record["val/median_loss"])
    two = train(toy(images, "batch=2x4", "trainer.devices=2"), tmp_path / "two")
    other = json.loads((two / "record.json").read_text())
    for name in ("val/median_loss", "val/first_loss", "val/rows"):
        assert other[name] == pytest.approx(record[name], rel=1e-3)


@pytest.mark.slow
def test_a_task_that_cannot_be_imported_is_one_line(images: Path, tmp_path: Path) -> None:
    """The name of the class is a setting, so a wrong one is a mistake of the user."""
    process = start(toy(images, "task._target_=toy.Tow"), tmp_path)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2 and "task._target_=toy.Tow cannot be imported as a class" in err
    assert "Traceback" not in err


def test_an_option_of_the_task_is_in_the_identity() -> None:
    """Two runs that smooth labels differently are two runs."""
    config = compose_train(["data=digits"])
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(config, resolve=True)
    other = {**values, "task": {**values["task"], "label_smoothing": 0.1}}
    assert identity(config, values) != identity(config, other)
