"""Keep the adapter of the best evaluation so far, stop early, and optionally end with the best adapter."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.files import read_tensors
from flamingo_ft.adapters.save import adapter_tensors
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.sharding import copy_into, reshard

from .checkpoints import best_folder, checkpoint_root


def evaluation_callbacks(recipe: Recipe, processor: FlamingoProcessor) -> list[TrainerCallback]:
    """Return the callbacks that act on evaluations during training: keep the best adapter, stop early."""
    if recipe.eval.steps is None:
        return []
    keep_best = KeepBest(processor, best_folder(checkpoint_root(recipe.train)))
    if recipe.eval.patience is None:
        return [keep_best]
    return [keep_best, EarlyStoppingCallback(recipe.eval.patience)]


class KeepBest(TrainerCallback):
    """Saves the adapter after each evaluation better than all before; also evaluates after the last step.

    ``state.best_metric`` (which transformers sets after this callback) and ``state.best_global_step`` are
    saved in checkpoints.
    """

    def __init__(self, processor: FlamingoProcessor, folder: Path):
        self.processor, self.folder = processor, folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.best_metric is not None and not self.folder.is_dir():
            warnings.warn(
                f"{self.folder}: the best adapter (of step {state.best_global_step}) is missing; "
                "the best one from here on is kept instead",
                stacklevel=2,
            )
            state.best_metric = state.best_global_step = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        value = (metrics or {}).get(f"eval_{args.metric_for_best_model}", math.nan)
        if is_better(value, state.best_metric, bool(args.greater_is_better)):
            state.best_global_step = state.global_step
            save_best(model, self.processor, self.folder)


def is_better(value: float, best: float | None, greater_is_better: bool) -> bool:
    """Return whether ``value`` beats the best so far; NaN never does."""
    if best is None:
        return math.isfinite(value)
    return value > best if greater_is_better else value < best


def save_best(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path) -> None:
    """Atomically replace the adapter in ``folder``; every process must call it."""
    main = processes.is_main()
    if main:
        atomic.begin_folder(folder)
    save_adapter(model, processor, atomic.partial_path(folder), write=main)
    if main:
        atomic.finish_folder(folder)
    processes.barrier()


@torch.no_grad()
def restore_best(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Load the adapter that `save_best` wrote into the same model."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder}: the best adapter is missing; resume with eval.keep=last to end with the last one"
        )
    stored = read_tensors(folder)
    reshard(model)
    for name, tensor in adapter_tensors(model).items():
        # LoRA initialized from the base (PiSSA) is stored with its initial values appended.
        copy_into(tensor, stored[name][tuple(slice(size) for size in tensor.shape)])


def apply_best(trainer: Any, recipe: Recipe) -> dict[str, Any]:
    """Restore the best adapter if ``eval.keep`` is best. Return the best evaluation for ``metrics.json``."""
    state, folder = trainer.state, best_folder(checkpoint_root(recipe.train))
    if recipe.eval.steps is None or state.best_global_step is None:
        return {}
    if recipe.eval.keep == "best":
        restore_best(trainer.model, folder)
    return {
        "best": {"step": state.best_global_step, recipe.eval.metric: state.best_metric},
        "kept": recipe.eval.keep,
    }
