"""A recipe's ``train`` and ``eval`` sections as the arguments of TRL's trainers."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from flamingo_ft.backbones.quantization import DTYPES
from flamingo_ft.config import Recipe
from flamingo_ft.evaluation.metrics import higher_is_better
from flamingo_ft.processes import default_device

from .optimizer import OPTIMIZERS, warmup_steps

# The recipe's names -> transformers' names, whose "constant" ignores warmup.
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the autocast dtype for ``train.precision`` on this machine; None for float32 without autocast.

    ``auto`` is bfloat16 on a GPU that supports it natively (a T4 only emulates it), float16 on any other GPU,
    and float32 on a CPU.
    """
    if precision != "auto":
        return None if precision == "fp32" else DTYPES[precision]
    if not torch.cuda.is_available():
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def trainer_arguments(recipe: Recipe) -> SFTConfig | DPOConfig:
    """Return the trainer's arguments for a recipe whose length is given by ``train.max_steps``."""
    if recipe.train.method == "dpo":
        return DPOConfig(**_common_arguments(recipe), **_dpo_arguments(recipe))
    return SFTConfig(**_common_arguments(recipe))


def _dpo_arguments(recipe: Recipe) -> dict[str, Any]:
    dpo = recipe.train.dpo
    return {
        "beta": dpo.beta,
        # TRL's sigmoid loss ignores label smoothing; the robust loss (arXiv:2403.00409) equals it without
        # smoothing.
        "loss_type": ["robust" if dpo.label_smoothing else dpo.loss_type],
        "label_smoothing": dpo.label_smoothing,
        # Policy and reference must differ by what was learned, not by dropout.
        "disable_dropout": True,
    }


def _common_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that SFT and DPO share."""
    train_config, eval_config = recipe.train, recipe.eval
    autocast = autocast_dtype(train_config.precision)
    return {
        "output_dir": str(train_config.output_dir),
        "max_steps": train_config.max_steps,
        "per_device_train_batch_size": train_config.batch_size,
        "gradient_accumulation_steps": train_config.gradient_accumulation_steps,
        "learning_rate": train_config.learning_rate,
        "weight_decay": train_config.weight_decay,
        "warmup_steps": warmup_steps(train_config),
        "lr_scheduler_type": SCHEDULERS[train_config.lr_scheduler],
        # An optimizer that steps inside the backward pass clips each gradient itself.
        "max_grad_norm": 0.0 if train_config.optimizer_in_backward else train_config.max_grad_norm,
        "optim": OPTIMIZERS[train_config.optimizer],
        "activation_checkpointing": train_config.gradient_checkpointing,
        "activation_offloading": train_config.activation_offload,
        "logging_steps": train_config.logging_steps,
        "logging_nan_inf_filter": False,  # by default Trainer hides NaN losses in the log
        "seed": train_config.seed,
        "bf16": autocast == torch.bfloat16,
        "fp16": autocast == torch.float16,
        "use_cpu": default_device().type == "cpu",  # otherwise Trainer refuses bf16 without a GPU
        "eval_strategy": "no" if eval_config.steps is None else "steps",
        "eval_steps": eval_config.steps,
        "per_device_eval_batch_size": eval_config.batch_size,
        "metric_for_best_model": eval_config.metric if eval_config.steps else None,
        "greater_is_better": higher_is_better(eval_config.metric),
        "save_strategy": "steps",
        "save_steps": train_config.save_steps or train_config.max_steps,  # the last step is saved in any case
        "save_only_model": train_config.fsdp,  # Trainer cannot save a sharded optimizer; the mixin does
        "ignore_data_skip": True,  # the batches resume at their own position
        "restore_callback_states_from_checkpoint": True,
        # Every trainable parameter gets a gradient in every batch, text-only batches included, so DDP need
        # not search the graph for unused ones, as it does by default with TRL.
        "ddp_find_unused_parameters": False,
        "report_to": "none",  # see tracker_callbacks
        "project": "flamingo_ft",  # for the trackers: name of the project, and of the run
        "run_name": train_config.output_dir.name,
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "max_length": None,
    }
