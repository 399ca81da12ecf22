"""The faster composition of a study's cells gives what Hydra gives, also for what is wrong."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.study import load_study
from exnorm.config.study_file import SCALES, has_scale
from exnorm.config.variants import compose_variant
from exnorm.studies.plan import SOURCE

CELLS = [
    [SOURCE.sub("a", word) for word in cell.train]
    for name in group_options("study")
    for scale in SCALES
    if has_scale(name, scale)
    for cell in load_study(name, scale).cells
]
WORDS = (
    *("norm=sn", "norm=bn", "norm=none_such", "model=resnet18", "task=segmentation", "debug=fast", "logger=off"),
    *("batch=8x2", "batch=[1,2]", "seed=3", "seed=three", "runs=~/r", "fresh=true", "seed=1,2", "batch=4x4,8x8"),
    *("norm.eps=1e-3", "norm.normalizers=[in,ln]", "norm.none=1", "norm.eps=null", "trainer.epochs=7", "optim.lr=0.1"),
    *("trainer.epochs=x", "trainer.snapshots=[0.1,0.5]", "trainer.snapshots=0.5", "data.mean=[0.5,0.5,0.5]"),
    *("data.root='a b=c'", 'data.root="${oc.env:HOME}/x"', "data.root=${runs}", "data.root=(", "optim.warmup=${seed}"),
    *("+norm.new=1", "++trainer.epochs=3", "~debug", "~trainer.epochs", "trainer=default", "trainer={epochs: 3}"),
    *("model.options={a: 1}", "model.options.b=2", "model.options={}", "data.noise.kind=symmetric", "data.noise=null"),
    *("task.mixup=0.2", "task@x=segmentation", "a.b@c=1", "hydra.verbose=true", "model.keep=[head.*]", "epochs=3", ""),
)


def outcome(compose: Any, words: list[str]) -> Any:
    try:
        config = compose(words)
    except UserError as problem:
        return str(problem)
    return OmegaConf.to_yaml(config), config._metadata.flags, OmegaConf.to_container(config, resolve=True)


def test_cells_of_studies_are_what_hydra_composes() -> None:
    for words in random.Random(0).sample(CELLS, 16):
        assert outcome(compose_variant, words) == outcome(compose_train, words)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.epochs=7", "++trainer.epochs=3"],
        ["trainer.epochs=7", "trainer.epochs=3"],
        ["data.noise={kind: symmetric, rate: 0.4}", "++data.noise.rate=0.1"],
        ["model.options={width: 4}", "+model.options.width=2"],
        ["model.options={width: 4}", "model.options.width=2", "model.options={depth: 3}"],
        ["norm.eps=1", "norm=sn", "norm=bn"],
        ["norm.eps=1", "~norm"],
    ],
)
def test_the_order_of_words_matters_as_to_hydra(words: list[str]) -> None:
    assert outcome(compose_variant, words) == outcome(compose_train, words)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_any_words_are_what_hydra_makes_of_them(words: list[str]) -> None:
    assert outcome(compose_variant, words) == outcome(compose_train, words)


def test_a_configuration_may_be_changed_without_changing_the_next_one() -> None:
    first = compose_variant(["norm=sn", "seed=1"])
    first.norm.eps, first.seed, first.data.mean = 1.0, 9, [0.0, 0.0, 0.0]
    assert compose_variant(["norm=sn", "seed=1"]) == compose_train(["norm=sn", "seed=1"])
