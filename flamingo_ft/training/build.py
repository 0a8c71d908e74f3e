"""Build what a recipe trains: the model with its processor, the trainer's arguments, and the trainer.

Before that, check what needs neither of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from flamingo_ft.adapters import init_bridge, prepare_training
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.precision import autocast_dtype, frozen_dtype
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.vision import load_recipe_vision
from flamingo_ft.config import DpoSection, Recipe
from flamingo_ft.config.metric_names import result_key
from flamingo_ft.data import OpenedData
from flamingo_ft.data.opened_data import with_max_steps
from flamingo_ft.data.render import apply_template
from flamingo_ft.evaluation.select_metrics import higher_is_better
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.build import recipe_options, set_media_options
from flamingo_ft.model.sharding import shard
from flamingo_ft.processes import default_device

from .checkpoint_folders import checkpoint_root
from .checkpoints import CheckpointPolicy
from .compat import mark_as_sharded
from .dataloader import make_train_batches
from .grpo import FlamingoGrpoTrainer, grpo_arguments, reward_functions
from .monitoring import check_trackers
from .optimizer import OPTIMIZERS, make_optimizer, peak_rates, warmup_steps
from .preflight import check_loss, check_machine, check_precision
from .trainer import FlamingoDpoTrainer, FlamingoKtoTrainer, FlamingoTrainer, FlamingoTrainerMixin

# The recipe's names -> transformers' names, whose "constant" ignores warmup.
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
TRAINERS: dict[str, Callable[..., FlamingoTrainerMixin]] = {
    "sft": FlamingoTrainer,
    "dpo": FlamingoDpoTrainer,
    "kto": FlamingoKtoTrainer,
    "grpo": FlamingoGrpoTrainer,
}
INIT_BATCHES = 16  # enough for EVA's principal directions to converge
QUANTIZATION_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")

# Given the model and its processor, return training batches for a data-driven LoRA initialization.
InitBatches = Callable[[FlamingoForConditionalGeneration, FlamingoProcessor], Iterable[Mapping[str, Any]]]


def check_settings(recipe: Recipe) -> None:
    """Check machine, precision, trackers and rewards. Raises UserError for what cannot be used here."""
    check_machine(recipe.train)
    check_precision(recipe)
    check_trackers(recipe.train)
    if recipe.train.method == "grpo":
        reward_functions(recipe.train.grpo)


def build_model(
    recipe: Recipe, init_batches: InitBatches | None = None
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build the recipe's model, ready to train, and its processor.

    The bridge is initialized from the seed or from ``model.init_from``; LoRA is added and parameters are
    frozen as the recipe says. init_batches: batches for the LoRA initialization that needs data (EVA).
    """
    model_config, device = recipe.model, default_device()
    dtype = frozen_dtype(autocast_dtype(recipe.train.precision))
    vision = load_recipe_vision(model_config.vision, dtype, shardable=recipe.train.fsdp)
    quantization = Quantization.of(model_config.language, shardable=recipe.train.fsdp)
    language = load_language(
        model_config.language.name,
        model_config.language.revision,
        dtype=None if quantization else dtype,
        quantization=quantization,
        device=device,
    )
    torch.manual_seed(recipe.train.seed)
    model, processor = build_flamingo(
        vision,
        language,
        **recipe_options(recipe),
    )
    apply_template(processor, recipe.data)
    set_media_options(processor, recipe.data)
    if model_config.init_from is not None:
        init_bridge(model, model_config.init_from, processor.image_processor)
    model.to(device)  # pyrefly: ignore[bad-argument-type] (transformers wraps torch's method)
    batches_of_model = None if init_batches is None else partial(init_batches, model, processor)
    prepare_training(model, recipe, batches_of_model)
    return model, processor


# --- the trainer ---


def make_trainer(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    data: OpenedData,
    recipe: Recipe,
    callbacks: list[TrainerCallback],
) -> FlamingoTrainerMixin:
    """Return a trainer over the recipe's data. Raises UserError if TRL's loss would be wrong for this model.

    ``model`` must be as it was before step 1, also when resuming: it is the reference of DPO, KTO and GRPO,
    and the checkpoint is restored afterwards.
    """
    recipe = with_max_steps(recipe, data)
    if recipe.train.fsdp:
        shard(model)
        mark_as_sharded(model)
    arguments = trainer_arguments(recipe)
    optimizer = make_optimizer(model, recipe, arguments)
    batches = make_train_batches(
        data, model, processor, recipe, arguments.process_index, arguments.world_size
    )
    policy = CheckpointPolicy(
        root=checkpoint_root(recipe.train),
        limit=recipe.train.save_total_limit,
        run_folder=recipe.train.output_dir,
        processor=processor,
        source_rows=count_source_rows(data),
    )
    rewards = {"reward_funcs": reward_functions(recipe.train.grpo)} if recipe.train.method == "grpo" else {}
    with hidden_quantization_flags(model):
        trainer = TRAINERS[recipe.train.method](
            batches,
            policy,
            recipe.train.non_finite,
            model=model,
            args=arguments,
            processing_class=processor,
            callbacks=callbacks,
            optimizers=(optimizer, None),
            **rewards,
        )
    check_loss(trainer)
    trainer.remove_callback(PrinterCallback)  # it would print log entries through the progress bar
    return trainer


@contextmanager
def hidden_quantization_flags(model: FlamingoForConditionalGeneration) -> Generator[None]:
    """Keep TRL from casting the trainable parameters, gates too, of a 4/8-bit model to bfloat16."""
    flags = {name: model.__dict__.pop(name) for name in QUANTIZATION_FLAGS if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(flags)


def first_batches(
    data: OpenedData, recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
) -> list[dict[str, torch.Tensor]]:
    """Return the first training batches, for a data-driven LoRA initialization."""
    batches = itertools.islice(make_train_batches(data, model, processor, recipe), INIT_BATCHES)
    of_trainer = ("completion_mask", "label")
    return [
        {name: tensor for name, tensor in batch.items() if name not in of_trainer and name[:3] != "KL_"}
        for batch in batches
    ]


def count_source_rows(data: OpenedData) -> dict[str, int | None]:
    """Return the number of rows of each training source; None for a stream."""
    return {
        weighted.source.name: weighted.size if weighted.source.indexed else None for weighted in data.train
    }


# --- its arguments ---


def trainer_arguments(recipe: Recipe) -> SFTConfig | DPOConfig | KTOConfig | GRPOConfig:
    """Return the trainer's arguments for a recipe whose length is given by ``train.max_steps``."""
    common, train_config = _common_arguments(recipe), recipe.train
    if train_config.method == "dpo":
        return DPOConfig(**common, **_dpo_arguments(train_config.dpo))
    if train_config.method == "kto":
        return KTOConfig(**common, **train_config.kto.model_dump())
    if train_config.method == "grpo":
        unknown_to_trl = ("max_length", "activation_offloading")
        known = {name: value for name, value in common.items() if name not in unknown_to_trl}
        return GRPOConfig(**known, **grpo_arguments(train_config.grpo))
    return SFTConfig(**common)


def _dpo_arguments(dpo: DpoSection) -> dict[str, Any]:
    # TRL's sigmoid loss ignores label smoothing; the robust loss (arXiv:2403.00409) equals it without
    # smoothing.
    robust = {"sigmoid": "robust"} if dpo.label_smoothing else {}
    return {
        "beta": dpo.beta,
        "loss_type": [robust.get(name, name) for name in dpo.loss_type],
        "loss_weights": None if dpo.loss_weights is None else [*dpo.loss_weights],
        "label_smoothing": dpo.label_smoothing,
        # Policy and reference must differ by what was learned, not by dropout.
        "disable_dropout": True,
    }


def _common_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that all methods share."""
    train_config, eval_config = recipe.train, recipe.eval
    autocast = autocast_dtype(train_config.precision)
    return {
        "output_dir": str(train_config.output_dir),
        "max_steps": train_config.max_steps,
        "per_device_train_batch_size": train_config.batch_size,
        "gradient_accumulation_steps": train_config.gradient_accumulation_steps,
        "learning_rate": max(peak_rates(recipe).values()),  # each parameter group has its own
        "weight_decay": train_config.weight_decay,
        "warmup_steps": warmup_steps(train_config),
        "lr_scheduler_type": SCHEDULERS[train_config.lr_scheduler],
        # An optimizer that steps inside the backward pass clips each gradient itself.
        "max_grad_norm": 0.0 if train_config.optimizer_in_backward else train_config.max_grad_norm,
        "optim": OPTIMIZERS[train_config.optimizer],
        "activation_checkpointing": train_config.gradient_checkpointing,
        "activation_offloading": train_config.activation_offload,
        "neftune_noise_alpha": train_config.neftune_noise_alpha,
        "logging_steps": train_config.logging_steps,
        "logging_nan_inf_filter": False,  # by default Trainer hides NaN losses in the log
        "seed": train_config.seed,
        "bf16": autocast == torch.bfloat16,
        "fp16": autocast == torch.float16,
        "use_cpu": default_device().type == "cpu",  # otherwise Trainer refuses bf16 without a GPU
        "eval_strategy": "no" if eval_config.steps is None else "steps",
        "eval_steps": eval_config.steps,
        "per_device_eval_batch_size": eval_config.batch_size,
        "metric_for_best_model": result_key(eval_config.metric) if eval_config.steps else None,
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
        # The routers of a mixture of experts are frozen, so there is nothing to balance. Besides, TRL 1.16
        # does not find the number of experts in some configurations (Mixtral, Granite).
        "router_aux_loss_coef": 0.0,
    }
