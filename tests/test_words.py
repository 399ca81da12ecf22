"""What people type and Hydra's grammar reads otherwise: quotes, home folders, options with dashes, similar keys."""

import shlex
from pathlib import Path

import pytest
from conftest import CliRunner
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_config import message
from torch import nn

from exnorm.config.compose import compose_eval, compose_train
from exnorm.config.errors import UserError
from exnorm.config.explain import known_values
from exnorm.config.words import HYDRA_OPTIONS, check_options, quoted, with_home
from exnorm.optim import build_optimizer, peak_lr

ODD_VALUES = [
    "a=b",
    "d/base(1)",
    "a dir,x",
    "a#b",
    "Bücher/鳥",
    "it's",
    'a "b"',
    "C:\\data\\",
    "a\\",
    "[x]",
    "{a}",
    "~x",
]


@pytest.mark.parametrize("value", [*ODD_VALUES, "${HOME}/x"])
def test_what_is_said_to_be_typed_is_the_value(value: str) -> None:
    """Through the shell's quotes and Hydra's."""
    (word,) = shlex.split(quoted("data.root", value))
    assert OverridesParser.create().parse_override(word).value() == value.replace("${", "\\${")
    assert compose_train([word]).data.root == value


@pytest.mark.parametrize("value", ["a=b", "d/base(1)", "a dir,x", "a#b", "Bücher", "[x", "it's"])
def test_a_value_that_needs_quotes_is_refused_with_the_quoted_form(value: str) -> None:
    assert quoted("data.root", value) in message(f"data.root={value}")


def test_a_variable_of_the_environment_is_written_in_hydras_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", "/d")
    assert message("data.root=${MY_DATA}/x").endswith("environment variable MY_DATA write ${oc.env:MY_DATA}")
    assert compose_train(["data.root=${oc.env:MY_DATA}/x"]).data.root == "/d/x"


@pytest.mark.parametrize("home", ["/home/me", "/home/Jörg (1)"])
def test_a_tilde_is_the_home_folder_wherever_a_path_begins(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    config = compose_train(["data.root=~/x", "runs=~", "model.init_from='~/a b'", 'data.exclude="~/c,d"'])
    assert (config.data.root, config.runs) == (f"{home}/x", home)
    assert (config.model.init_from, config.data.exclude) == (f"{home}/a b", f"{home}/c,d")
    assert compose_eval({"name": "digits"}, ["checkpoint=~/best.pt"]).checkpoint == f"{home}/best.pt"
    sweep = OverridesParser.create().parse_override(with_home("runs=~/a,~/b"))
    assert [str(value).strip('"') for value in sweep.sweep_string_iterator()] == [f"{home}/a", f"{home}/b"]
    assert with_home("~norm") == "~norm"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--epochs", "3"], "there is no option --epochs. Write trainer.epochs=3"),
        (["norm=en", "--lr=0.1"], "there is no option --lr. Write optim.lr=0.1"),
        (["--norm", "sn", "-m"], "there is no option --norm. Write norm=sn"),
        (["--batch-size", "8x32"], "there is no option --batch-size. Write batch=8x32"),
        (["--seed", "norm=en"], "there is no option --seed. Write seed=VALUE"),
        (["-x"], "there is no option -x. A setting is written KEY=VALUE, such as trainer.epochs=3"),
    ],
)
def test_an_option_with_dashes_is_refused_with_the_setting_that_is_meant(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(words)
    assert str(caught.value).startswith(line)


def test_the_command_line_refuses_options_with_one_line(run_cli: CliRunner) -> None:
    done = run_cli("train", "--epochs", "3")
    assert done.returncode == 2
    assert done.stderr == "exnorm: error: there is no option --epochs. Write trainer.epochs=3\n"


def test_hydras_own_options_pass() -> None:
    """Hydra's parser is private; a new version with other options is noticed here."""
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert options == HYDRA_OPTIONS
    own = {"-cd", "--config-dir"}  # of exnorm, because `exnorm list` and the others need the folder, too
    check_options([*(HYDRA_OPTIONS - own), "--cfg=job", "seed=-1", "norm=en"])
    for name in own:
        with pytest.raises(UserError, match="exnorm --config-dir DIR train"):
            check_options([f"{name}=folder"])


@pytest.mark.parametrize("key", sorted(key for key in known_values("train") if not key.startswith("norm.")))
def test_the_last_word_of_a_key_is_enough_to_find_it(key: str) -> None:
    """In a wrong group, too. Some keys of data are defaults of another key, which is named instead."""
    followed = {
        "data.epochs": "trainer.epochs",
        "data.schedule": "optim.schedule",
        "data.lr_per_256": "optim.lr_per_256",
    }
    if "." in key:
        line = message(f"nosuch.{key.rpartition('.')[2]}=1")
        assert f"'{followed.get(key, key)}'" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.sam=1", "unknown key 'trainer.sam': trainer has epochs, steps"),
        ("trainer.lr=1", "did you mean 'optim.lr'?"),
        ("trainer.epoch=1", "did you mean 'trainer.epochs'?"),
        ("optm.lr=1", "did you mean 'optim.lr'?"),
        ("data.image_sice=1", "did you mean 'data.image_size'?"),
        ("wieght_decay=1", "did you mean 'optim.weight_decay'?"),
        (
            "optim=lamb",
            "unknown optim 'lamb': allowed: adamw, cosine, sgd. For another optimizer of timm type optim.name=lamb",
        ),
    ],
)
def test_a_wrong_key_is_told_by_its_last_word_or_the_keys_of_its_group(override: str, words: str) -> None:
    assert words in message(override)


def test_adamw_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    config = compose_train(["optim=adamw"]).optim
    assert peak_lr(config, total_batch=256) <= 0.001
    assert type(build_optimizer(nn.Linear(1, 1), config, total_batch=256)).__name__ == "AdamW"


@pytest.mark.parametrize(("name", "fits"), [("adamw", False), ("lamb", False), ("momentum", True), ("sgdw", True)])
def test_no_optimizer_gets_a_learning_rate_that_is_meant_for_another(name: str, fits: bool) -> None:
    config = compose_train([f"optim.name={name}"]).optim
    if fits:
        build_optimizer(nn.Linear(1, 1), config, total_batch=256)
        return
    with pytest.raises(UserError, match="learning rate of SGD.*type optim=adamw"):
        build_optimizer(nn.Linear(1, 1), config, total_batch=256)
    build_optimizer(nn.Linear(1, 1), compose_train([f"optim.name={name}", "optim.lr=0.001"]).optim, total_batch=256)
