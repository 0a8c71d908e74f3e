"""The learning-rate schedule: how long warmup lasts, and its rates after a resumed run was given another length."""

from __future__ import annotations

import math
from typing import Any

from flamingo_ft.config import TrainSection
from flamingo_ft.data.epochs import exact_fraction


def warmup_steps(train: TrainSection) -> int:
    """Optimizer steps of warmup, of a recipe with ``max_steps``."""
    if train.warmup_ratio is None:
        return train.warmup_steps
    return math.ceil(exact_fraction(train.warmup_ratio) * train.max_steps)


def recompute_learning_rates(scheduler: Any) -> None:
    """Set the learning rates of the step that a restored `LambdaLR` stands at by its own schedule.

    The optimizer's state has those of the schedule that it was saved with, which may have been for fewer steps.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in pairs]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
