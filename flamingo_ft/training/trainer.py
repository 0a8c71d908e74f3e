"""TRL's trainer, set up as a recipe says."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from flamingo_ft.adapters.prepare import frozen_copy, match_training_mode, zero_dropout
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.epochs import with_max_steps
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.sharding import shard

from .arguments import trainer_arguments
from .batches import training_batches
from .checkpoints import Keeping, checkpoint_root
from .engine import Engine
from .label_positions import at_label_positions
from .loss_check import check_loss
from .optimizer import make_optimizer

LOOKED_AT = 16  # batches, gone over until the directions settle
QUANTIZED_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


class FlamingoTrainer(Engine, SFTTrainer):
    """Supervised fine-tuning: the loss is that of the label tokens, and nothing else is scored."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        return super().compute_loss(model, at_label_positions(inputs), *arguments, **options)


class FlamingoDpoTrainer(Engine, DPOTrainer):
    """Direct preference optimisation (arXiv:2305.18290) against the model that it starts from, neither with dropout."""

    def __init__(self, *given: Any, model: FlamingoForConditionalGeneration, **arguments: Any):
        zero_dropout(model)
        super().__init__(*given, model=model, ref_model=frozen_copy(model), **arguments)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        match_training_mode(self.ref_model, self.model.training)
        with (
            warnings.catch_warnings()
        ):  # TRL 1.16 asks transformers for the old name of activation checkpointing
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return super().compute_loss(*arguments, **options)


TRAINERS = {"sft": FlamingoTrainer, "dpo": FlamingoDpoTrainer}


def make_trainer(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    data: OpenedData,
    recipe: Recipe,
    callbacks: list[TrainerCallback],
) -> FlamingoTrainer | FlamingoDpoTrainer:
    """A trainer over the recipe's data. UserError where its loss would be a wrong one.

    ``model`` is what dpo compares with: a run that goes on restores what was trained afterwards.
    """
    recipe = with_max_steps(recipe, data)
    if recipe.train.fsdp:
        _shard(model)
    arguments = trainer_arguments(recipe)
    optimizer = make_optimizer(model, recipe.train, arguments)
    batches = training_batches(data, model, processor, recipe, arguments.process_index, arguments.world_size)
    with as_if_unquantized(model):
        trainer = TRAINERS[recipe.train.method](
            batches,
            Keeping(
                checkpoint_root(recipe.train),
                recipe.train.save_total_limit,
                recipe.train.output_dir,
                processor,
                rows_of(data),
            ),
            recipe.train.non_finite,
            model=model,
            args=arguments,
            processing_class=processor,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    check_loss(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints every log entry through the progress bar
    return trainer


def _shard(model: FlamingoForConditionalGeneration) -> None:
    """Over all processes. Trainer takes it for a model that was sharded while it was loaded, and leaves it so."""
    shard(model)
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True


@contextmanager
def as_if_unquantized(model: FlamingoForConditionalGeneration) -> Iterator[None]:
    """Keep TRL from casting what trains to bfloat16, gates and all, as it does for a model in 4 or 8 bits."""
    flags = {name: model.__dict__.pop(name) for name in QUANTIZED_FLAGS if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(flags)


def first_batches(
    data: OpenedData, recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
) -> list[dict[str, torch.Tensor]]:
    """Some of the batches that will be trained on, for an initialisation that looks at them."""
    batches = itertools.islice(training_batches(data, model, processor, recipe), LOOKED_AT)
    return [
        {name: tensor for name, tensor in batch.items() if name != "completion_mask"} for batch in batches
    ]


def rows_of(data: OpenedData) -> dict[str, int | None]:
    """How many rows each source of training data has; None for a stream."""
    return {mixed.source.name: mixed.size if mixed.source.indexed else None for mixed in data.train}
