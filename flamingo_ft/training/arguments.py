"""A recipe's ``train`` and ``eval`` sections in the words of TRL's trainers."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe
from flamingo_ft.evaluation.metrics import higher_is_better

from .optimizer import OPTIMIZERS
from .precision import computes_in
from .schedule import warmup_steps

# The recipe's names -> transformers', whose "constant" knows no warm-up.
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def trainer_arguments(recipe: Recipe) -> SFTConfig | DPOConfig:
    """What `make_trainer` gives its trainer, for a recipe with ``train.max_steps``."""
    if recipe.train.method == "dpo":
        return DPOConfig(**_common(recipe), **_dpo(recipe))
    return SFTConfig(**_common(recipe))


def _dpo(recipe: Recipe) -> dict[str, Any]:
    wanted = recipe.train.dpo
    return {
        "beta": wanted.beta,
        # TRL's sigmoid loss knows no wrong labels; the robust one (arXiv:2403.00409) is the same where there are none.
        "loss_type": ["robust" if wanted.label_smoothing else wanted.loss_type],
        "label_smoothing": wanted.label_smoothing,
        # Policy and reference differ by what was learned, not by which units a backbone happened to drop.
        "disable_dropout": True,
    }


def _common(recipe: Recipe) -> dict[str, Any]:
    """What holds for every method."""
    wanted, judged = recipe.train, recipe.eval
    return {
        "output_dir": str(wanted.output_dir),
        "max_steps": wanted.max_steps,
        "per_device_train_batch_size": wanted.batch_size,
        "gradient_accumulation_steps": wanted.gradient_accumulation_steps,
        "learning_rate": wanted.learning_rate,
        "weight_decay": wanted.weight_decay,
        "warmup_steps": warmup_steps(wanted),
        "lr_scheduler_type": SCHEDULERS[wanted.lr_scheduler],
        # Stepping in the backward pass, each gradient is clipped by itself.
        "max_grad_norm": 0.0 if wanted.optimizer_in_backward else wanted.max_grad_norm,
        "optim": OPTIMIZERS[wanted.optimizer],
        "activation_checkpointing": wanted.gradient_checkpointing,
        "activation_offloading": wanted.activation_offload,
        "logging_steps": wanted.logging_steps,
        "logging_nan_inf_filter": False,  # by default a loss that is no number is logged as a good one
        "seed": wanted.seed,
        "bf16": computes_in(wanted.precision) == torch.bfloat16,
        "fp16": computes_in(wanted.precision) == torch.float16,
        "use_cpu": default_device().type == "cpu",  # else bfloat16 is refused where there is no GPU
        "eval_strategy": "no" if judged.steps is None else "steps",
        "eval_steps": judged.steps,
        "per_device_eval_batch_size": judged.batch_size,
        "metric_for_best_model": judged.metric if judged.steps else None,
        "greater_is_better": higher_is_better(judged.metric),
        "save_strategy": "steps",
        "save_steps": wanted.save_steps or wanted.max_steps,  # the last step has one in any case
        "save_only_model": wanted.fsdp,  # Trainer knows no checkpoints of a sharded model, and does not write them here
        "ignore_data_skip": True,  # batches know themselves where they were
        "restore_callback_states_from_checkpoint": True,
        # Every parameter that trains has a gradient in every batch, of plain text too: looking for others, as TRL does
        # by default, would only cost a walk through the graph.
        "ddp_find_unused_parameters": False,
        "report_to": "none",  # see trackers.py
        "project": "flamingo_ft",  # name of the run's project there, and of the run
        "run_name": wanted.output_dir.name,
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "max_length": None,
    }
