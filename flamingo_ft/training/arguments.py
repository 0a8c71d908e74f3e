"""A recipe's ``train`` and ``eval`` sections in the words of TRL's trainers."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe

from .optimizer import OPTIMIZERS
from .precision import computes_in_bf16


def trainer_arguments(recipe: Recipe) -> SFTConfig:
    """What `make_trainer` gives its trainer."""
    return SFTConfig(**_common(recipe))


def _common(recipe: Recipe) -> dict[str, Any]:
    """What holds for every method."""
    wanted = recipe.train
    return {
        "output_dir": str(wanted.output_dir),
        "max_steps": wanted.max_steps,
        "per_device_train_batch_size": wanted.batch_size,
        "gradient_accumulation_steps": wanted.gradient_accumulation_steps,
        "learning_rate": wanted.learning_rate,
        "weight_decay": wanted.weight_decay,
        "warmup_steps": wanted.warmup_steps,
        "lr_scheduler_type": wanted.lr_scheduler,
        # Stepping in the backward pass, each gradient is clipped by itself.
        "max_grad_norm": 0.0 if wanted.optimizer_in_backward else wanted.max_grad_norm,
        "optim": OPTIMIZERS[wanted.optimizer],
        "activation_checkpointing": wanted.gradient_checkpointing,
        "activation_offloading": wanted.activation_offload,
        "logging_steps": wanted.logging_steps,
        "logging_nan_inf_filter": False,  # by default a loss that is no number is logged as a good one
        "seed": wanted.seed,
        "bf16": computes_in_bf16(wanted.precision),
        "use_cpu": default_device().type == "cpu",  # else bfloat16 is refused where there is no GPU
        "save_strategy": "steps",
        "save_steps": wanted.save_steps or wanted.max_steps,  # the last step has one in any case
        "ignore_data_skip": True,  # batches know themselves where they were
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",  # see trackers.py
        "project": "flamingo_ft",  # name of the run's project there, and of the run
        "run_name": wanted.output_dir.name,
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "max_length": None,
    }
