"""Files of weights that people have: of timm, Lightning, torchvision's references or plain torch, and safetensors.

Such a file holds more than tensors, as the arguments of a command line or a configuration. `weights_only=True` refuses
the whole file then. Here each class that torch does not know is replaced by an empty stand-in, so nothing of it is
imported or run, and the tensors are read.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from exnorm.config.errors import UserError, first_line

OLD_FORMAT_CLASSES = ("argparse.Namespace",)  # torch lists no classes of a file from before its version 1.6


class StandIn:
    """Takes the place of an object of an unknown class, whatever it is made from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore what the object is made from."""

    def __setstate__(self, state: Any) -> None:
        """Ignore what the object would hold."""


class DictStandIn:
    """Makes a dict in the place of an object that may be one: torch puts items into dicts alone."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # pyright: ignore[reportInconsistentConstructor]
        return OrderedDict()


def read_file(path: Path) -> dict[str, Any]:
    """What a file of weights holds: a state dict, or a dict with one or more of them and other things.

    Raises:
        UserError: no such file, or one that holds no dict.
    """
    try:
        state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except Exception as problem:  # noqa: BLE001 - whatever a strange file makes the readers raise
        raise UserError(f"{path} cannot be read as weights ({first_line(problem)})") from None
    if isinstance(state, StandIn):
        raise UserError(f"{path} holds a pickled object, not its weights: save its state_dict() instead")
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no weights but a {type(state).__name__}")
    return dict(state)


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # objects of other classes
    unknown: list[str]
    try:
        unknown = get_unsafe_globals_in_checkpoint(str(path))
    except ValueError:
        unknown = [*OLD_FORMAT_CLASSES]
    try:
        return _with_stand_ins(path, unknown, StandIn)
    except pickle.UnpicklingError:
        return _with_stand_ins(path, unknown, DictStandIn)


def _with_stand_ins(path: Path, unknown: list[str], stand_in: type) -> Any:
    with safe_globals([(stand_in, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True)
