"""A mistake of the user is one line; a bug, of exnorm or of code that it runs, keeps its traceback."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from engine_cases import WAIT_S, environment, make_image_folder, tiny
from torch import nn

from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.config.explain import is_user_error
from exnorm.models import build_network, classifier

MY_NORM = """
from exnorm.norms import BatchNorm


class MyNorm(BatchNorm):
    def coefficients(self, moments):
        scale, shift, rest = super().coefficients(moments)
        return scale, shift


class Odd(BatchNorm):
    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        int("a word")
"""
REPORT = "To report it, send the lines above and what `exnorm doctor` prints."


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`exnorm ARGUMENTS` with somebody's own norms on the path."""
    (folder / "lib").mkdir(exist_ok=True)
    (folder / "lib" / "my_norms.py").write_text(MY_NORM)
    env = environment()
    env["PYTHONPATH"] = f"{folder / 'lib'}{os.pathsep}{env['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", "exnorm", *arguments],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def test_a_bug_in_somebodys_norm_keeps_its_traceback(tmp_path: Path) -> None:
    """It was one line without a place, like a mistake on the command line."""
    done = run(tmp_path, *tiny(make_image_folder(tmp_path / "data"), "norm=bn", "norm._target_=my_norms.MyNorm"))
    lines = done.stderr.splitlines()
    assert done.returncode != 0
    assert any("my_norms.py" in line and "in coefficients" in line for line in lines), done.stderr
    assert any(line.startswith("ValueError: not enough values to unpack") for line in lines), done.stderr
    assert any(line.endswith(REPORT) for line in lines)


def test_what_a_norm_refuses_at_its_first_forward_is_one_line(tmp_path: Path) -> None:
    """`norm=in` has nothing to normalize where a feature map has one pixel."""
    done = run(tmp_path, *tiny(make_image_folder(tmp_path / "data"), "norm=in"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and REPORT not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("exnorm: error: ")]
    assert "InstanceNorm" in line


def build(*overrides: str) -> nn.Module:
    """A small model with its norms."""
    config = compose_train(["model=resnet18", "model.name=test_resnet", "norm=bn", *overrides])
    return build_network(partial(classifier, num_classes=3), config.model, config.norm)


@pytest.fixture
def somebodys_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with norms of somebody's own."""
    (tmp_path / "my_norms.py").write_text(MY_NORM)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_bug_in_the_constructor_of_somebodys_norm_is_no_mistake_of_the_user(somebodys_norms: None) -> None:
    with pytest.raises(ValueError, match="invalid literal for int") as caught:
        build("norm._target_=my_norms.Odd")
    assert not is_user_error(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("norm._target_=my_norms.Nothing", "norm._target_=my_norms.Nothing cannot be imported as a class"),
        ("norm.eps=-1", "eps=-1"),
        ("+model.options.wdith=2", "model=test_resnet norm=bn: .*unexpected keyword argument 'wdith'"),
    ],
)
def test_what_norms_and_libraries_refuse_is_one_line(somebodys_norms: None, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build(override)
    assert "\n" not in str(caught.value)


def test_only_errors_that_are_written_for_users_are_theirs() -> None:
    assert is_user_error(UserError("no such thing"))
    assert is_user_error(FileNotFoundError(2, "No such file or directory", "a.txt"))
    for bug in (ValueError("not enough values to unpack"), KeyError("a"), OSError(5, "Input/output error")):
        assert not is_user_error(bug)


def test_a_bug_of_a_command_says_how_to_report_it(tmp_path: Path) -> None:
    code = (
        "from exnorm import cli\n"
        "from exnorm.runs import listing\n"
        "def list_runs(root): int('a word')\n"
        "listing.list_runs = list_runs\n"
        "cli.main()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "runs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ValueError: invalid literal" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(REPORT)
