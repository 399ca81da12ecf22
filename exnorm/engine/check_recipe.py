"""Check what a recipe adds to the papers' training: averages, clipping, mixing. Imports no torch."""

from typing import Any

from exnorm.config.errors import UserError
from exnorm.engine.batch import BatchPlan


def check_recipe(config: Any, plan: BatchPlan) -> None:
    """Refuse values that cannot be, and combinations that do not work.

    Raises:
        UserError: the message says what is allowed.
    """
    ema, clip_norm = config.trainer.ema, config.optim.clip_norm
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"trainer.ema={ema:g} is not possible; give a decay between 0 and 1, such as 0.9999")
    if clip_norm is not None and clip_norm <= 0:
        raise UserError(f"optim.clip_norm={clip_norm:g} is not possible; give a number above 0, such as 1")
    if config.task.get("mixup") or config.task.get("cutmix"):
        _check_mixing(plan)


def check_warmup(optim: Any, *, steps: int) -> None:
    """Refuse a warm-up that does not end before the training does."""
    if optim.warmup_steps is not None and optim.warmup_steps >= steps:
        raise UserError(f"optim.warmup_steps={optim.warmup_steps}, but the run has {steps} steps. Give fewer")


def _check_mixing(plan: BatchPlan) -> None:
    if plan.samples % 2:
        raise UserError(
            f"task.mixup and task.cutmix mix pairs of images of a replica, which has {plan.samples} here. Choose a "
            "batch with an even number of samples per replica"
        )
    if plan.span > 1:
        raise UserError(
            "task.mixup and task.cutmix need all images of a replica on one device. Type "
            f"trainer.devices={plan.replicas}, or fewer"
        )
