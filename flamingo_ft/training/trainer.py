"""TRL's supervised fine-tuning trainer, set up as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.config import Recipe
from flamingo_ft.data import Collator, Sample
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .loss_check import check_loss

# Vectors and tables that stand for themselves; pulling them to zero would not make the model simpler.
UNDECAYED = ("perceiver.latents", "perceiver.frame_embs", "perceiver.media_time_embs", "token_rows.")


def make_trainer(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    sources: Sequence[Sequence[Sample]],
    recipe: Recipe,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """A trainer over the recipe's sources, one list of samples each. UserError where its loss would be a wrong one."""
    groups = parameter_groups(model, recipe.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.train.learning_rate)
    trainer = SFTTrainer(
        model=model,
        args=trainer_arguments(recipe),
        data_collator=Collator(processor, text_limit(model, recipe.data.max_text_tokens)),
        train_dataset=mix(sources, [source.weight for source in recipe.data.train], recipe.train.seed),
        processing_class=processor,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    check_loss(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints every log entry through the progress bar
    return trainer


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
        max_grad_norm=wanted.max_grad_norm,
        activation_checkpointing=wanted.gradient_checkpointing,
        logging_steps=wanted.logging_steps,
        logging_nan_inf_filter=False,  # by default a loss that is no number is logged as a good one
        seed=wanted.seed,
        bf16=computes_in_bf16(wanted.precision),
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


def text_limit(model: FlamingoForConditionalGeneration, wanted: int | None) -> int:
    """Longest sample in text tokens: as wanted, within the language model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit for limit in (wanted, context, 2**31) if limit)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for the optimizer: matrices decay; gates, norms, latents and token rows do not."""
    named = trainable_parameters(model)
    decayed = {name for name, p in named.items() if p.dim() >= 2 and not name.startswith(UNDECAYED)}
    return [
        {"params": [named[name] for name in sorted(decayed)], "weight_decay": weight_decay},
        {"params": [named[name] for name in sorted(named.keys() - decayed)], "weight_decay": 0.0},
    ]


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
