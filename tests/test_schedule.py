"""`trainer.steps` and `trainer.validate_every`: the same training, counted in steps."""

import json
import signal
from pathlib import Path

import pytest
from engine_cases import (
    assert_bit_equal,
    assert_same_run,
    checkpoints,
    last_state,
    make_image_folder,
    metrics,
    only_run,
    start,
    tiny,
    train_here,
    wait_for,
)
from omegaconf import OmegaConf

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data.loader import TrainBatches
from exnorm.engine.launch import check
from exnorm.engine.schedule import make_schedule

STEPS = 6  # in an epoch of the tiny data set: 48 images, 8 a step


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"epochs": 3}, [0, 6, 12, 18]),
        ({"steps": 14}, [0, 6, 12, 14]),
        ({"epochs": 2, "validate_every": 5}, [0, 5, 10, 12]),
        ({"steps": 4, "validate_every": 9}, [0, 4]),
    ],
)
def test_parts_cover_all_steps_and_the_last_may_be_shorter(settings: dict[str, int], parts: list[int]) -> None:
    trainer = OmegaConf.create({"epochs": 100, "steps": None, "validate_every": None, **settings})
    schedule = make_schedule(trainer, steps_per_epoch=STEPS)
    assert [schedule.start(part) for part in range(schedule.parts + 1)] == parts


def test_batches_do_not_depend_on_where_an_iteration_begins() -> None:
    """Parts that cross the end of an epoch see the same batches as epochs do."""
    batches = TrainBatches(50, total=8, seed=3)
    batches.between(0, 3 * STEPS)
    whole = list(batches)
    assert {epoch for epoch, _ in whole[STEPS]} == {1}
    for cut in range(1, 3 * STEPS):
        batches.between(0, cut)
        first = list(batches)
        batches.between(cut, 3 * STEPS)
        assert len(batches) == 3 * STEPS - cut and first + list(batches) == whole


@pytest.mark.slow
def test_steps_are_the_same_training_as_epochs(images: Path, tmp_path: Path) -> None:
    """The weights are equal to the last bit, however often the run validates."""
    epochs = train_here(tiny(images, "optim.schedule=poly"), tmp_path / "epochs")
    steps = train_here(
        tiny(images, "optim.schedule=poly", "trainer.steps=12", "trainer.validate_every=5"), tmp_path / "steps"
    )
    assert_bit_equal(last_state(epochs)["model"], last_state(steps)["model"])
    assert [row["step"] for row in metrics(steps)] == [5, 10, 12]
    record = json.loads((steps / "record.json").read_text())
    assert (record["steps"], record["epochs"]) == (12, 3)


@pytest.mark.slow
def test_a_run_in_steps_resumes_across_the_end_of_an_epoch(images: Path, tmp_path: Path) -> None:
    """Stopped after its first validation, which lies inside an epoch."""
    settings = tiny(images, "trainer.steps=40", "trainer.validate_every=7", "trainer.checkpoint_every_steps=2")
    whole = train_here(settings, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    process = start(settings, tmp_path / "cut")
    wait_for(lambda: [*(tmp_path / "cut").glob("runs/*/*/checkpoints/step-000000008.pt")], "a checkpoint")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    run = only_run(tmp_path / "cut")
    assert not (run / "record.json").exists() and checkpoints(run)
    assert_same_run(whole, train_here(settings, tmp_path / "cut"))


@pytest.mark.parametrize("setting", ["trainer.steps=0", "trainer.validate_every=0"])
def test_counts_below_one_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting} is not possible; give 1 or more"):
        check(compose_train([setting]))
