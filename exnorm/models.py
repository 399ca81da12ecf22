"""Backbones with their normalization replaced: any model of timm by its name, and torchvision's ShuffleNet v2."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import timm
import torch
import torchvision
from torch import Tensor, nn

from exnorm.config.errors import UserError, first_line, suggest
from exnorm.config.groups import option_values
from exnorm.norms import Norm
from exnorm.surgery import convert

# The keys under which a file keeps a state dict: first averaged weights (timm, torchvision), then other weights.
STATE_DICTS = ("state_dict_ema", "model_ema", "model", "state_dict")
COMPILED = "_orig_mod."  # the part that torch.compile adds to names
TORCHVISION_PREFIX = "shufflenet_v2_"  # timm has none


def build_model(model_config: Any, norm_config: Mapping[str, Any], *, num_classes: int) -> nn.Module:
    """Return the backbone with `num_classes` outputs, converted to the normalizer.

    Raises:
        UserError: an unknown name, an option that the constructor refuses, or nothing to convert.
    """
    return normalized(lambda: classifier(model_config, num_classes=num_classes), model_config, norm_config)


def classifier(model_config: Any, *, num_classes: int) -> nn.Module:
    """Return the backbone with `num_classes` outputs."""
    return _backbone(model_config, num_classes)


def normalized(network: Callable[[], nn.Module], model_config: Any, norm_config: Mapping[str, Any]) -> nn.Module:
    """Return the network that `network` makes, converted to the normalizer.

    Raises:
        UserError: as `network` does, or there is nothing to convert.
    """
    try:
        options = _chosen_options(norm_config)
        return convert(network(), _target(norm_config["_target_"]), replace=tuple(model_config.replace), **options)
    except UserError as problem:
        raise UserError(f"model={model_config.name} norm={norm_config['name']}: {problem}") from problem


def _target(name: str) -> Any:
    """Return the class of a normalizer from its full name. An error inside its module keeps its traceback."""
    try:
        return hydra.utils.get_class(name)
    except (ImportError, ValueError) as problem:
        if isinstance(problem.__cause__, ModuleNotFoundError | None):
            raise UserError(f"norm._target_={name} cannot be imported as a class; give module.Class") from problem
        raise


def _backbone(config: Any, num_classes: int) -> nn.Module:
    """Return the model of a library. If the library rejects a name or an option, the error becomes a UserError."""
    try:
        return _of_library(config, num_classes)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError) as problem:
        raise UserError(first_line(problem)) from problem


def _chosen_options(norm_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from the yaml's. For the others, each layer keeps its own value, such as eps."""
    defaults = option_values("norm", norm_config["name"])
    given = {key: value for key, value in norm_config.items() if key not in ("name", "_target_")}
    return {key: value for key, value in given.items() if key not in defaults or value != defaults[key]}


def _of_library(config: Any, num_classes: int) -> nn.Module:
    options = dict(config.options)
    if config.name.startswith(TORCHVISION_PREFIX):
        return _torchvision(config, num_classes, options)
    architecture = config.architecture or config.name
    if not timm.is_model(architecture):
        raise UserError(f"unknown model; {suggest(architecture, timm.list_models())}")
    return timm.create_model(
        architecture,
        pretrained=config.pretrained,
        num_classes=num_classes,
        drop_rate=config.drop_rate,
        **options,
    )


def _torchvision(config: Any, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if config.drop_rate:
        raise UserError("torchvision's ShuffleNet v2 has no dropout; leave model.drop_rate at 0")
    if not config.pretrained:
        return torchvision.models.get_model(config.name, num_classes=num_classes, **options)
    model = torchvision.models.get_model(config.name, weights="DEFAULT", **options)
    assert isinstance(model.fc, nn.Linear)
    if num_classes != model.fc.out_features:
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> list[str]:
    """Load a state dict into a model, also across norms and heads; return a line for each thing that was left.

    A (C,) affine parameter is copied to each normalizer of a (K, C) one. Left at their initial values: the ratio
    branch where the source has none, and a classifier of another number of classes.

    Raises:
        UserError: the weights are of another architecture.
    """
    own, norms, classifiers = model.state_dict(), _norm_names(model), _classifiers(model)
    given, taken = _state_for(own, state)
    given = _in_own_shapes(given, own, norms)
    reshaped = {key for key, value in given.items() if key in own and own[key].shape != value.shape}
    head = {key for key in reshaped if key.rpartition(".")[0] in classifiers}
    lacking = {key for key in own.keys() ^ given.keys() if key.rpartition(".")[0] not in norms}  # on either side
    if wrong := sorted((reshaped - head) | lacking):
        raise UserError(f"{source} holds the weights of another architecture: {wrong[0]} ({len(wrong)} in all) differs")
    model.load_state_dict({k: v for k, v in given.items() if k in own and k not in head}, strict=False)
    missing = len(own.keys() - given.keys())
    notes = taken + [f"classifier {key} has another shape and starts anew" for key in sorted(head)]
    return notes + ([f"{missing} parameters and buffers of the norms start anew"] if missing else [])


def _in_own_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], norms: set[str]) -> dict[str, Tensor]:
    """A source's tensors, those of norms in the shapes of the model: (C,) as (K, C), and (1, C, 1, 1) as (C,)."""
    fitted = dict(given)
    for key in own.keys() & given.keys():
        value, other = own[key], given[key]
        if value.ndim == 2 and other.ndim == 1 and value.shape[1] == other.shape[0]:
            fitted[key] = other.expand_as(value)
        elif key.rpartition(".")[0] in norms and value.numel() == other.numel():  # as in the published SN code
            fitted[key] = other.reshape(value.shape)
    return fitted


def _state_for(own: Mapping[str, Tensor], content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in a file's content, under the model's own names, and a note for each choice.

    If there are several state dicts, the averaged weights are taken, as in timm. The names may have the prefix of
    DataParallel (`module.`), `torch.compile` (`_orig_mod.`) or a trainer's class (`model.` in Lightning).
    """
    there = [key for key in STATE_DICTS if isinstance(content.get(key), Mapping) and content[key]]
    state = content[there[0]] if there else content
    notes = [f"loaded {there[0]}; the file also has {' and '.join(there[1:])}"] if len(there) > 1 else []
    given = {key.replace(COMPILED, ""): value for key, value in state.items() if isinstance(value, Tensor)}
    end = f".{next(iter(own))}"
    prefixes = dict.fromkeys(["", *(key[: 1 - len(end)] for key in given if key.endswith(end))])
    prefix = max(prefixes, key=lambda start: sum(start + key in given for key in own))
    inside = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    if prefix:
        others = sorted(key for key in given if not key.startswith(prefix))
        left = f"; {len(others)} others, such as {others[0]}, were not loaded" if others else ""
        notes.append(f"loaded the weights whose names begin with {prefix}{left}")
    return inside, notes


def load_ratios(model: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load from a state dict only the parameters of the norms that determine their ratios.

    Raises:
        UserError: the model has no such parameters, or the source has other ones.
    """
    own = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, Norm) and hasattr(module, "ratios")
        for key, parameter in module.named_parameters(recurse=False)
        if key not in ("weight", "bias")
    }
    given, _ = _state_for(model.state_dict(), state)
    wrong = [key for key, parameter in own.items() if key not in given or given[key].shape != parameter.shape]
    if wrong or not own:
        which = f"{source} has no {wrong[0]} like this model's" if wrong else "no layer of this model mixes normalizers"
        raise UserError(f"model.init_ratios_from={source}: {which}; give a run with the same model and norm")
    model.load_state_dict({key: given[key] for key in own}, strict=False)


def _norm_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Norm)}


def _classifiers(model: nn.Module) -> set[str]:
    """Return the names of the classifiers: timm's (a distilled DeiT has two), else the last linear layer."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if named:
        return {named} if isinstance(named, str) else set(named)
    return set([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:])


def count_parameters(model: nn.Module) -> int:
    """Return the number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


def gflops_per_image(model: nn.Module, image_size: int) -> float:
    """Return the multiply-adds of one forward of one image, in 1e9. Each counts as one operation, as in the papers."""
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(image)
    model.train(was_training)
    return counter.get_total_flops() / 2 / 1e9
