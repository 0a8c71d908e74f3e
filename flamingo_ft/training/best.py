"""The adapter of the best evaluation so far, kept beside the checkpoints, and training that ends where none gets better."""

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
from flamingo_ft.model.sharding import fill, let_go

from .checkpoints import best_folder, checkpoint_root


def evaluation_callbacks(recipe: Recipe, processor: FlamingoProcessor) -> list[TrainerCallback]:
    """What evaluations during training, where there are any, lead to."""
    if recipe.eval.steps is None:
        return []
    keep = KeepBest(processor, best_folder(checkpoint_root(recipe.train)))
    return [keep] if recipe.eval.patience is None else [keep, EarlyStoppingCallback(recipe.eval.patience)]


class KeepBest(TrainerCallback):
    """Writes the adapter after each evaluation that is better than those before it; also judges the last step.

    ``state.best_metric`` (set by transformers, after this) and ``state.best_global_step`` go with a checkpoint.
    """

    def __init__(self, processor: FlamingoProcessor, folder: Path):
        self.processor, self.folder = processor, folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.best_metric is not None and not self.folder.is_dir():
            warnings.warn(
                f"{self.folder}: the adapter of the best evaluation (step {state.best_global_step}) is not there; "
                "the best is now looked for among the evaluations from here on",
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
        if is_better(value, state.best_metric, args.greater_is_better):
            state.best_global_step = state.global_step
            write_best(model, self.processor, self.folder)


def is_better(value: float, best: float | None, greater: bool) -> bool:
    """Whether a metric is better than the best so far; one that is no number never is."""
    if best is None:
        return math.isfinite(value)
    return value > best if greater else value < best


def write_best(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path) -> None:
    """Put the adapter in ``folder``, whole or not at all, in place of the one there; every process has to come here."""
    main = processes.is_main()
    if main:
        atomic.begin_folder(folder)
    save_adapter(model, processor, atomic.partial_path(folder), write=main)
    if main:
        atomic.finish_folder(folder)
    processes.barrier()


@torch.no_grad()
def put_back(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Give ``model`` the adapter that `write_best` wrote of it."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder}: the best adapter is gone; resume with eval.keep=last to end with the last one"
        )
    stored = read_tensors(folder)
    let_go(model)
    for name, tensor in adapter_tensors(model).items():
        # Updates that started from the base (PiSSA) are stored with their start behind them.
        fill(tensor, stored[name][tuple(slice(size) for size in tensor.shape)])


def take_best(trainer: Any, recipe: Recipe) -> dict[str, Any]:
    """Give the model the adapter of its best evaluation, where the recipe ends with that; what `metrics.json` says of
    the best."""
    state, folder = trainer.state, best_folder(checkpoint_root(recipe.train))
    if recipe.eval.steps is None or state.best_global_step is None:
        return {}
    if recipe.eval.keep == "best":
        put_back(trainer.model, folder)
    return {
        "best": {"step": state.best_global_step, recipe.eval.metric: state.best_metric},
        "kept": recipe.eval.keep,
    }
