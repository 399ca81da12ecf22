"""The conversion of a network to the normalizer of a config."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from exnorm.config.errors import UserError
from exnorm.config.groups import own_values
from exnorm.config.options import imported_class
from exnorm.models.segmentation import SegmentationNetwork
from exnorm.surgery import convert
from exnorm.surgery.layers import changed_options, constructor_options


def build_network(build: Callable[[Any], nn.Module], model_config: Any, norm_config: Mapping[str, Any]) -> nn.Module:
    """Return the network `build(model_config)`, converted to the normalizer.

    Raises:
        UserError: what `build` raises, and see `normalized`. The message begins with the names of model and norm.
    """
    with _names(model_config, norm_config):
        network = build(model_config)
    return normalized(network, model_config, norm_config)


def normalized(network: nn.Module, model_config: Any, norm_config: Mapping[str, Any]) -> nn.Module:
    """Convert a network to the normalizer, in place, and return it.

    `model_config.replace` has the kinds of layers to replace, and `model_config.keep` patterns of the names of layers
    that stay. Both are explained in `exnorm.surgery.convert`.

    Raises:
        UserError: an option that the normalizer refuses, a pattern without a layer, or nothing to convert.
    """
    with _names(model_config, norm_config):
        cls = imported_class("norm", norm_config["_target_"])
        converted = convert(
            network,
            cls,
            replace=tuple(model_config.replace),
            keep=tuple(model_config.keep),
            **chosen_options(cls, norm_config),
        )
        if isinstance(converted, SegmentationNetwork):
            converted.check_pooled_norms()
        return converted


@contextmanager
def _names(model_config: Any, norm_config: Mapping[str, Any]) -> Iterator[None]:
    """Put the names of model and norm in front of the message of a user's mistake."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"model={model_config.name} norm={norm_config['name']}: {problem}") from problem


def chosen_options(cls: Any, norm_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from the defaults: those of the yaml if it is exnorm's own, else of the class."""
    return changed_options(norm_config, own_values("norm", norm_config["name"]) or constructor_options(cls))
