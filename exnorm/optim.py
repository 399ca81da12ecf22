"""The optimizer and the learning rate at each step.

The papers' protocol: SGD, momentum 0.9, no Nesterov, weight decay 1e-4 on all parameters, lr 0.1 x (total batch / 256),
x 0.1 at 0.3, 0.6 and 0.9 of the epochs. The rate is a function of the step alone, so a resumed run needs no state.
"""

import math
from typing import Any

import timm.optim
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from exnorm.config.errors import UserError, suggest
from exnorm.config.schema import OptimConfig
from exnorm.models.parts import head_parameters
from exnorm.norms import Norm

LIKE_SGD = ("momentum", "nesterov", "nesterovw", "lars", "nlars", "larc", "nlarc")  # SGD's learning rate works for them
SCHEDULES = ("step", "cosine", "poly")
ROUNDING = 1e-6  # of a step: 0.6 x 100 epochs is not exactly 60 in binary


def build_optimizer(model: nn.Module, config: Any, *, total_batch: int) -> torch.optim.Optimizer:
    """Return SGD over all parameters, or any optimizer of timm by its name.

    Raises:
        UserError: an unknown optimizer or schedule, or a scale of the heads' rate that is not above 0.
    """
    if config.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={config.schedule} is unknown; allowed: {', '.join(SCHEDULES)}")
    if config.head_lr_scale <= 0:
        raise UserError(f"optim.head_lr_scale={config.head_lr_scale:g} is not possible; give a number above 0")
    lr = peak_lr(config, total_batch=total_batch)
    parameters = parameter_groups(model, lr, decay=config.decay, head_lr_scale=config.head_lr_scale)
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,  # one pass over the parameters, on a CPU too
        )
    names = [str(name) for name in timm.optim.list_optimizers()]
    if config.name not in names:
        raise UserError(f"optim.name={config.name} is unknown; {suggest(config.name, names)} (the papers use sgd)")
    _refuse_rate_of_sgd(config)
    return timm.optim.create_optimizer_v2(
        parameters,
        opt=config.name,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
    )


def _refuse_rate_of_sgd(config: Any) -> None:
    """Raise an error if an optimizer like Adam would get SGD's rate. EN's ratios would be one-hot within an epoch."""
    like_sgd = "sgd" in config.name or config.name in LIKE_SGD
    if not like_sgd and config.lr is None and config.lr_per_256 == OptimConfig.lr_per_256:
        raise UserError(
            f"optim.name={config.name} would get the learning rate of SGD, {config.lr_per_256:g} for a batch of 256, "
            "which is too high for it; set one, such as optim.lr=0.0005, or type optim=adamw, which has its own rate"
        )


def parameter_groups(
    model: nn.Module, lr: float, *, decay: str = "all", head_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups: one for most parameters, and others for those with options of their own.

    Those are the options of `Norm.param_options`, no weight decay for what `decay` excludes, and the heads' rate.

    Args:
        decay: `all`, or `weights` for the weights of convolutions and linear layers only. Parameters of norms, also
            the matrices of EN, then do not decay.
        head_lr_scale: a factor on the learning rate of all parameters outside of `model.backbone`, or of the classifier
            if the model has no backbone. It multiplies a norm's own `lr_scale`.
    """
    own: dict[nn.Parameter, dict[str, float]] = {}
    for module in model.modules():
        if isinstance(module, Norm):
            options = module.param_options().items()
            own |= {p: option for name, option in options if (p := getattr(module, name)).requires_grad}
    if decay == "weights":
        own = {p: {"weight_decay": 0.0, **own.get(p, {})} for p in _without_decay(model)}
    if head_lr_scale != 1:
        for p in head_parameters(model):
            if p.requires_grad:
                before = own.get(p, {})
                own[p] = {**before, "lr_scale": head_lr_scale * before.get("lr_scale", 1.0)}
    usual = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in own]
    groups: list[dict[str, Any]] = [{"params": usual}]
    for options in {tuple(sorted(options.items())): options for options in own.values()}.values():
        params = [parameter for parameter in own if own[parameter] == options]
        groups.append({"params": params, "lr": lr * options.get("lr_scale", 1.0), **options})
    return groups


def _without_decay(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not weights of convolutions or linear layers."""
    weights = {module.weight for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)}
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in weights]


def peak_lr(config: Any, *, total_batch: int) -> float:
    """Return `lr`, or `lr_per_256` x (total batch / 256) if `lr` is None."""
    return config.lr if config.lr is not None else config.lr_per_256 * total_batch / 256


def learning_rate(config: Any, *, step: int, steps: int, total_batch: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, of `steps`.

    step: peak x gamma^(milestones passed), milestones being fractions of all steps. cosine: peak x (1 + cos(pi t)) / 2.
    poly: peak x (1 - t)^power. Here t goes from 0 to 1 over the steps after the warm-up. Warm-up: linear from 0 over
    `warmup_steps`, or the fraction `warmup` of all steps.
    """
    peak = peak_lr(config, total_batch=total_batch)
    warmup_steps = config.warmup * steps if config.warmup_steps is None else config.warmup_steps
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "poly":
        return peak * max(0.0, 1 - progress) ** config.power
    passed = sum(step >= fraction * steps - ROUNDING for fraction in config.milestones)
    return peak * config.gamma**passed


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group to the rate of a step, times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
