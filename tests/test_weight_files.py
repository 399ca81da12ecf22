"""Files of weights as people have them: written by timm itself, as Lightning writes them, compiled, averaged."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from test_models import build
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.engine.checkpoint import read_weights
from exnorm.models import load_ratios, load_weights


class AttributeDict(dict[str, Any]):
    """A class that torch does not know, as Lightning's of the same name."""


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


def randomized(model: nn.Module) -> nn.Module:
    """A model in which no two parameters are equal."""
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The model has these weights."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("averaged", [True, False])
def test_a_checkpoint_that_timm_wrote_is_loaded_and_averaged_weights_are_said(tmp_path: Path, averaged: bool) -> None:
    """It holds the Namespace of timm's command line, which `weights_only=True` alone refuses."""
    model = randomized(build("bn"))
    ema = timm.utils.ModelEmaV3(model) if averaged else None
    if ema is not None:
        randomized(ema.module)
    args = argparse.Namespace(model="test_resnet", lr=0.1, folder=Path("x"))
    saver = timm.utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args=args, model_ema=ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=50.0)
    target = build("bn")
    notes = load_weights(target, read_weights(tmp_path / "last.pth.tar"), source="last.pth.tar")
    assert_loaded(target, (ema.module if ema is not None else model).state_dict())
    assert notes == (["loaded state_dict_ema; the file also has state_dict"] if averaged else [])


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.", "net.backbone."])
def test_what_stands_before_the_names_is_taken_off(tmp_path: Path, prefix: str) -> None:
    source, target = randomized(build("sn")), build("sn")
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    load_weights(target, read_weights(tmp_path / "w.ckpt"), source="w.ckpt")
    assert_loaded(target, source.state_dict())
    again = build("sn")
    load_ratios(again, read_weights(tmp_path / "w.ckpt"), source="w.ckpt")
    for name, value in source.named_parameters():
        if name.endswith("mean_weight"):
            assert torch.equal(again.get_parameter(name), value)


def test_a_checkpoint_of_lightning_is_loaded_and_what_is_left_is_said(tmp_path: Path) -> None:
    """Its hyperparameters are of classes that torch does not know; its loss has weights of its own."""
    source, target = randomized(build("bn")), build("bn")
    state = {f"model.{name}": value for name, value in source.state_dict().items()}
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state | {"criterion.weight": torch.ones(3)},
        "hyper_parameters": AttributeDict(lr=0.1, args=argparse.Namespace(a=Path("b"))),
        "callbacks": {"ModelCheckpoint": {"dirpath": Path("x"), "best": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
    }
    torch.save(content, tmp_path / "last.ckpt")
    notes = load_weights(target, read_weights(tmp_path / "last.ckpt"), source="last.ckpt")
    assert_loaded(target, source.state_dict())
    assert notes == [
        "loaded the weights whose names begin with model.; 1 others, such as criterion.weight, were not loaded"
    ]


def test_averaged_weights_of_torchvisions_references_are_loaded(tmp_path: Path) -> None:
    source, target = randomized(build("bn")), build("bn")
    ema = torch.optim.swa_utils.AveragedModel(source, use_buffers=True)
    content = {"model": build("bn").state_dict(), "model_ema": ema.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(target, read_weights(tmp_path / "w.pth"), source="w.pth")
    assert_loaded(target, source.state_dict())


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, new_format: bool) -> None:
    """Neither imported nor called: the file is read without it, or refused."""
    made, file = tmp_path / "made", tmp_path / "w.pth"
    source = randomized(build("bn"))
    content = {"state_dict": source.state_dict(), "other": Runs(made)}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    target = build("bn")
    if new_format:
        load_weights(target, read_weights(file), source="w.pth")
        assert_loaded(target, source.state_dict())
    else:
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_weights(file)
    assert not made.exists()


def test_a_pickled_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(build("bn"), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"holds a pickled object, not its weights: save its state_dict\(\)"):
        read_weights(tmp_path / "model.pt")
