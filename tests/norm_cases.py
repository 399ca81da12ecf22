"""What the tests of the normalizers share: every norm of `conf/norm`, its naive reference, and random cases."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from exnorm.config.folders import conf_dir
from exnorm.config.groups import group_options
from exnorm.norms import BatchScopeNorm, Norm, reference
from exnorm.surgery import norm_class
from exnorm.testing import Layer

NORMS = group_options("norm")
BATCH_NORMS = [name for name in NORMS if issubclass(norm_class(name), BatchScopeNorm)]
# Norms of which nothing is left where a sample has one position per channel: they refuse it.
REFUSES_ONE_POSITION = {"in"}
# Options that fit six channels, on which most tests run.
SMALL: dict[str, dict[str, Any]] = {
    "gn": {"num_groups": 3},
    "en": {"reduction": 3, "pi": 4},
}
SHAPES = {2: (4, 6), 3: (4, 6, 5), 4: (4, 6, 3, 5), 5: (3, 6, 2, 3, 2)}

Parameters = Mapping[str, Tensor]
Reference = Callable[[Tensor, Parameters, Any, "reference.Running | None"], Tensor]
REFERENCES: dict[str, Reference] = {
    "bn": lambda x, p, norm, running: reference.normalize(x, "bn", p, norm.eps, running),
    "in": lambda x, p, norm, running: reference.normalize(x, "in", p, norm.eps, running),
    "ln": lambda x, p, norm, running: reference.normalize(x, "ln", p, norm.eps, running),
    "gn": lambda x, p, norm, running: reference.group_norm(x, p, norm.eps, norm.num_groups),
    "sn": lambda x, p, norm, running: reference.switch_norm(x, p, norm.eps, norm.normalizers, running),
    "ssn": lambda x, p, norm, running: reference.switch_norm(
        x, p, norm.eps, norm.normalizers, running, reference.sparsemax
    ),
    "brn": lambda x, p, norm, running: reference.normalize(x, "bn", p, norm.eps, running),  # as BN at first
    "en": lambda x, p, norm, running: reference.exemplar_norm(
        x, p, norm.eps, norm.normalizers, running, norm.hidden_act
    ),
}


def yaml_options(name: str) -> dict[str, Any]:
    """The options in a norm's yaml, without its name and target."""
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "norm" / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in ("name", "_target_")}


def layer_of(name: str, channels: int = 6) -> Layer:
    """The class of a norm with options that fit few channels."""
    return Layer(norm_class(name), channels, SMALL.get(name, {}))


def build(
    name: str,
    channels: int = 6,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Norm:
    """A norm with random parameters and running statistics."""
    return layer_of(name, channels).build(seed=seed, dtype=dtype, **options)


def expected(name: str, norm: Norm, x: Tensor, parameters: Parameters | None = None) -> Tensor:
    """The naive output of a norm for (N, C, *spatial), with its own parameters or with the given ones."""
    assert name in REFERENCES, f"a new norm {name!r} needs a naive form in exnorm/norms/reference.py and REFERENCES"
    running = None
    if isinstance(norm, BatchScopeNorm) and norm.running_mean is not None and norm.running_var is not None:
        running = None if norm.training else (norm.running_mean, norm.running_var)
    return REFERENCES[name](
        x,
        dict(norm.named_parameters()) if parameters is None else parameters,
        norm,
        running,
    )
