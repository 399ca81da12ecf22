"""Read files of weights: from timm, Lightning, torchvision's references or plain torch, and safetensors.

Such a file may hold more than tensors, for example the arguments of a command line or a configuration. Then
`weights_only=True` refuses the complete file. Here an empty stand-in replaces each class that torch does not know. So
no code of such a class is imported or run, and the tensors are read.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from exnorm.config.errors import UserError, first_line

SAFETENSORS = ".safetensors"
OLD_FORMAT_CLASSES = ("argparse.Namespace",)  # torch lists no classes of a file from before its version 1.6


class StandIn:
    """Replaces an object of an unknown class, with any arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the arguments of the object."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the content of the object."""


class DictStandIn:
    """Replaces an object that may be a dict by a dict, because torch only puts items into dicts."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # pyright: ignore[reportInconsistentConstructor]
        return OrderedDict()


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a file of weights: a state dict, or a dict with one or more of them and other values.

    Raises:
        UserError: there is no such file, or it does not hold a dict.
    """
    try:
        state = _safetensors(path) if path.suffix.lower() == SAFETENSORS else _torch(path)
    except Exception as problem:  # noqa: BLE001 - readers raise many kinds of errors for a strange file
        raise UserError(f"{path} cannot be read as weights ({first_line(problem)})") from None
    if isinstance(state, StandIn):
        raise UserError(f"{path} holds a pickled object, not its weights: save its state_dict() instead")
    if not isinstance(state, Mapping):
        raise UserError(f"{path} does not hold weights but a {type(state).__name__}")
    return dict(state)


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # the file has objects of other classes
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
