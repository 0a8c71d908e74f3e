"""TRL's supervised fine-tuning trainer, set up as a recipe says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.stream.batches import Batches
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .batches import training_batches
from .loss_check import check_loss
from .optimizer import OPTIMIZERS, make_optimizer
from .precision import computes_in_bf16

LOOKED_AT = 16  # batches, gone over until the directions settle
QUANTIZED_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


class FlamingoTrainer(SFTTrainer):
    """TRL's trainer over batches that come ready made."""

    def __init__(self, batches: Batches, **arguments: Any):
        # TRL looks at a dataset to learn that there are images in it; rows are drawn by `batches` alone.
        super().__init__(train_dataset=Dataset.from_list([{"messages": [], "images": []}]), **arguments)
        self.batches = batches

    def get_train_dataloader(self) -> Batches:
        """Endless; the recipe's number of steps ends the run."""
        return self.batches


def make_trainer(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    data: OpenedData,
    recipe: Recipe,
    callbacks: list[TrainerCallback],
) -> FlamingoTrainer:
    """A trainer over the recipe's data. UserError where its loss would be a wrong one."""
    arguments = trainer_arguments(recipe)
    optimizer = make_optimizer(model, recipe.train, arguments)
    batches = training_batches(data, model, processor, recipe, arguments.process_index, arguments.world_size)
    with as_if_unquantized(model):
        trainer = FlamingoTrainer(
            batches,
            model=model,
            args=arguments,
            processing_class=processor,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    check_loss(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints every log entry through the progress bar
    return trainer


@contextmanager
def as_if_unquantized(model: FlamingoForConditionalGeneration) -> Iterator[None]:
    """Keep TRL from casting what trains to bfloat16, gates and all, as it does for a model in 4 or 8 bits."""
    flags = {name: model.__dict__.pop(name) for name in QUANTIZED_FLAGS if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(flags)


def trainer_arguments(recipe: Recipe) -> SFTConfig:
    """The recipe's ``train`` section in the trainer's words."""
    wanted = recipe.train
    return SFTConfig(
        output_dir=str(wanted.output_dir),
        max_steps=wanted.max_steps,
        per_device_train_batch_size=wanted.batch_size,
        gradient_accumulation_steps=wanted.gradient_accumulation_steps,
        learning_rate=wanted.learning_rate,
        weight_decay=wanted.weight_decay,
        warmup_steps=wanted.warmup_steps,
        lr_scheduler_type=wanted.lr_scheduler,
        max_grad_norm=0.0 if wanted.optimizer_in_backward else wanted.max_grad_norm,  # there each is clipped by itself
        optim=OPTIMIZERS[wanted.optimizer],
        activation_checkpointing=wanted.gradient_checkpointing,
        activation_offloading=wanted.activation_offload,
        logging_steps=wanted.logging_steps,
        logging_nan_inf_filter=False,  # by default a loss that is no number is logged as a good one
        seed=wanted.seed,
        bf16=computes_in_bf16(wanted.precision),
        use_cpu=default_device().type == "cpu",  # else bfloat16 is refused where there is no GPU
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        max_length=None,
    )


def first_batches(
    data: OpenedData, recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
) -> list[dict[str, torch.Tensor]]:
    """Some of the batches that will be trained on, for an initialisation that looks at them."""
    return list(itertools.islice(training_batches(data, model, processor, recipe), LOOKED_AT))


def adapter_folder(output_dir: Path, step: int) -> Path:
    """Where the adapter of an unfinished run is kept."""
    return output_dir / "checkpoints" / f"step-{step}"
