"""TRL's supervised fine-tuning trainer, set up as a recipe says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe
from flamingo_ft.data import Collator, Sample
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .loss_check import check_loss
from .optimizer import OPTIMIZERS, make_optimizer

LOOKED_AT = 16  # batches, gone over until the directions settle
QUANTIZED_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")

def make_trainer(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    sources: Sequence[Sequence[Sample]],
    recipe: Recipe,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """A trainer over the recipe's sources, one list of samples each. UserError where its loss would be a wrong one."""
    arguments = trainer_arguments(recipe)
    optimizer = make_optimizer(model, recipe.train, arguments)
    with as_if_unquantized(model):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            data_collator=collator(model, processor, recipe),
            train_dataset=training_rows(sources, recipe),
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
        dataloader_num_workers=wanted.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        max_length=None,
    )


def computes_in_bf16(precision: str) -> bool:
    """Whether to compute in bfloat16; ``auto`` does so where the GPU supports it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def first_batches(
    sources: Sequence[Sequence[Sample]],
    recipe: Recipe,
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
) -> list[dict[str, torch.Tensor]]:
    """Some of the batches that will be trained on, for an initialisation that looks at them."""
    rows = training_rows(sources, recipe).shuffle(recipe.train.seed)
    batches = rows.iter(recipe.train.batch_size)
    as_rows = (Dataset.from_dict(batch).to_list() for batch in itertools.islice(batches, LOOKED_AT))
    return [collator(model, processor, recipe)(batch) for batch in as_rows]


def collator(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, recipe: Recipe) -> Collator:
    """From rows to batches, as long as the recipe and the language model allow."""
    return Collator(processor, text_limit(model, recipe.data.max_text_tokens))


def training_rows(sources: Sequence[Sequence[Sample]], recipe: Recipe) -> Dataset:
    """The recipe's sources, mixed by their weights."""
    return mix(sources, [source.weight for source in recipe.data.train], recipe.train.seed)


def text_limit(model: FlamingoForConditionalGeneration, wanted: int | None) -> int:
    """Longest sample in text tokens: as wanted, within the language model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit for limit in (wanted, context, 2**31) if limit)


def mix(sources: Sequence[Sequence[Sample]], weights: Sequence[float], seed: int) -> Dataset:
    """One dataset of all sources; a source of weight 2 is drawn twice as often as its share of the rows."""
    datasets = [Dataset.from_list([asdict(sample) for sample in samples]) for samples in sources]
    if len(set(weights)) == 1:
        return concatenate_datasets(datasets)
    shares = [weight * len(rows) for weight, rows in zip(weights, datasets, strict=True)]
    probabilities = [share / sum(shares) for share in shares]
    return interleave_datasets(datasets, probabilities, seed=seed, stopping_strategy="all_exhausted")


def adapter_folder(output_dir: Path, step: int) -> Path:
    """Where the adapter of an unfinished run is kept."""
    return output_dir / "checkpoints" / f"step-{step}"
