"""Load weights from elsewhere into a model: across norms, heads and numbers of classes, and from trainers' files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exnorm.config.errors import UserError, shorten
from exnorm.models.parts import backbone_of, output_names
from exnorm.norms import Norm

# The keys under which a file keeps a state dict: first averaged weights (timm, torchvision), then other weights.
STATE_DICTS = ("state_dict_ema", "model_ema", "model", "state_dict")
COMPILED = "_orig_mod."  # the part that torch.compile adds to names
BACKBONE = "backbone."  # the beginning of a backbone's names in a network with heads


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> list[str]:
    """Load a state dict into a model, also across norms and heads; return a line for each thing that was left.

    A (C,) affine parameter is copied to each normalizer of a (K, C) one. Left at their initial values: the ratio
    branch where the source has none, and the last layer of a classifier or head with another number of classes.

    A network with a backbone also takes the weights of a classification network. Its heads then start anew. So does a
    head that the source has not.

    Raises:
        UserError: the weights are of another architecture.
    """
    own, norms, outputs = model.state_dict(), _norm_names(model), output_names(model)
    given, notes = _under_own_names(model, own, state)
    given = _in_own_shapes(given, own, norms)
    reshaped = {key for key, value in given.items() if key in own and own[key].shape != value.shape}
    resized = {key for key in reshaped if key.rpartition(".")[0] in outputs}
    new, left = _heads_apart(model, own.keys(), given.keys())
    lacking = {key for key in (own.keys() ^ given.keys()) - new - left if key.rpartition(".")[0] not in norms}
    if wrong := sorted((reshaped - resized) | lacking):
        raise UserError(f"{source} holds the weights of another architecture: {wrong[0]} ({len(wrong)} in all) differs")
    model.load_state_dict({k: v for k, v in given.items() if k in own and k not in resized}, strict=False)
    if left:
        names = shorten(sorted(key.removeprefix(BACKBONE) for key in left))
        notes.append(f"left out what this network does not have: {names}")
    if new:
        heads = sorted({key.partition(".")[0] for key in new})
        notes.append(f"{' and '.join(heads)}, for which the source has no weights, start anew")
    notes += [f"classifier {key} has another shape and starts anew" for key in sorted(resized)]
    missing = len(own.keys() - given.keys() - new)
    return notes + ([f"{missing} parameters and buffers of the norms start anew"] if missing else [])


def _under_own_names(
    model: nn.Module, own: Mapping[str, Tensor], content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `_state_for` of a source; where that is a classification network, its names begin with `backbone.`."""
    given, notes = _state_for(own, content)
    backbone = backbone_of(model)
    if backbone is None or any(key.startswith(BACKBONE) for key in given.keys() & own.keys()):
        return given, notes
    inside = backbone.state_dict()
    given, notes = _state_for(inside, content)
    return {BACKBONE + _in_backbone(key, inside): value for key, value in given.items()}, notes


def _in_backbone(key: str, inside: Mapping[str, Tensor]) -> str:
    """Return the name that a parameter of a classification network has in timm's feature extractor.

    It is the same for a ResNet. For others, timm writes `stages_0` instead of `stages.0`, or puts `model.` in front.
    """
    return next((name for name in (key, key.replace(".", "_", 1), f"model.{key}") if name in inside), key)


def _heads_apart(model: nn.Module, own: Iterable[str], given: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the own names of heads that the source has not, and the source's names of parts that the model has not.

    The latter are those of a classifier, and of an auxiliary head. Both are empty for a classification network.
    """
    backbone = backbone_of(model)
    if backbone is None:
        return set(), set()
    given = list(given)
    own_parts, given_parts = ({key.partition(".")[0] for key in keys} for keys in (own, given))
    new = {key for key in own if key.partition(".")[0] in own_parts - given_parts}
    stages = {name for name, _ in backbone.named_children()}
    return new, {
        key
        for key in given
        if key.partition(".")[0] not in own_parts
        or (key.startswith(BACKBONE) and key.removeprefix(BACKBONE).partition(".")[0] not in stages)
    }


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
