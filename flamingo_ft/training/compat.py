"""Private names of torch, transformers and TRL that training needs, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves  # torch has no public way to walk nested outputs of modules
from transformers.trainer import TRAINER_STATE_NAME  # the file of TrainerState, which Trainer reads on resume
from transformers.trainer_callback import ExportableState  # callbacks whose state goes into a checkpoint

# The output head of TRL's losses, which its trainers add to the models that they are given. GRPOTrainer takes
# no reference model, only a name to load one from.
from trl.trainer.utils import add_fused_lm_head

__all__ = [
    "TRAINER_STATE_NAME",
    "ExportableState",
    "add_fused_lm_head",
    "disable_amp_scaling_in_step",
    "mark_as_sharded",
    "set_last_learning_rates",
    "tree_leaves",
]


def disable_amp_scaling_in_step(optimizer: torch.optim.Optimizer) -> None:
    """Make GradScaler unscale before the step, not inside a fused optimizer.

    There, a skipped step counts as taken and advances the schedule. torch has no public switch for it.
    """
    setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010 (no such attribute in torch's stubs)


def set_last_learning_rates(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: Sequence[float]) -> None:
    """Set what ``scheduler.get_last_lr()`` returns, which torch sets only in `step`."""
    scheduler._last_lr = list(rates)


def mark_as_sharded(model: Any) -> None:
    """Make Trainer treat a model sharded by `fully_shard` as one that transformers sharded while loading.

    It then neither wraps nor moves the model. There is no public way to hand Trainer a sharded model.
    """
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
