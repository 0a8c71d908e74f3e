"""Evaluation before, during and after training, and the adapter of the best evaluation.

An evaluation generates answers to the held-out questions and measures the loss on held-out samples. It does
not change what training learns: it draws no random numbers and puts the model back into training mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
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
from flamingo_ft.backbones.precision import autocast_dtype
from flamingo_ft.config import Recipe
from flamingo_ft.config.metric_names import result_key
from flamingo_ft.data import Sample
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import ACCURACY, Metric
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.results import COLUMN_HEADERS, Results
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.sharding import copy_into, is_sharded, reshard
from flamingo_ft.progress import Bars

from .checkpoint_folders import best_folder, checkpoint_root
from .eval_batches import EvalBatches
from .image_loss import RowLoss, gap_to_swapped, loss_by_kind, recorded_outputs, row_losses
from .interruptions import oom_as_user_error


class Evaluator:
    """Answers the held-out questions at several points of a run; ``results`` collects the answers."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        samples: Sequence[Sample],
        recipe: Recipe,
        progress: Bars,
        metrics: Sequence[Metric] = (ACCURACY,),
    ):
        self.results = Results(questions_of(samples), metrics=metrics)
        self._options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
        self._predictor = Predictor(model, processor)
        self._progress, self._model = progress, model
        self._autocast = autocast_dtype(recipe.train.precision)

    def scores(self) -> dict[str, float]:
        """Answer the held-out questions and return each metric that is defined; the answers are not kept."""
        questions = self.results.questions
        answers = self._answers("evaluating", questions, keep_bar=False)
        values = {metric.name: metric.evaluate(questions, answers) for metric in self.results.metrics}
        return {name: value for name, value in values.items() if value is not None}

    def evaluate(self, name: str, samples: Sequence[Sample]) -> None:
        """Answer the questions of ``samples``, held-out ones or a variant; keep the answers as ``name``."""
        questions = questions_of(samples)
        if questions:
            self.results.answers[name] = self._answers(f"evaluating, {COLUMN_HEADERS[name]}", questions)

    def _answers(self, title: str, questions: Sequence[Question], keep_bar: bool = True) -> list[str]:
        """Return the answers in the order of ``questions``.

        The questions are split over the processes; with a sharded model, every process runs all of them.
        """
        sharded = is_sharded(self._model)
        own_questions = questions if sharded else processes.shard(questions)
        bar = self._progress.add_task(title, total=len(own_questions), note="")
        autocast = torch.autocast(self._model.device.type, self._autocast, enabled=self._autocast is not None)
        with oom_as_user_error("evaluation"), autocast:
            on_batch = partial(self._progress.advance, bar)
            answers = self._predictor.answer(own_questions, on_batch=on_batch, **self._options)
        if keep_bar:
            self._progress.finish(bar)
        else:
            self._progress.remove_task(bar)
        return answers if sharded else processes.unshard(answers)


@torch.no_grad()
def run_evaluation(
    trainer: Any, eval_batches: EvalBatches, scores_fn: Callable[[], dict[str, float]] | None
) -> dict[str, float]:
    """Evaluate the trainer's model and log the result.

    Returns ``eval_loss``, the mean over all label tokens or pairs, the gap to the loss of another image
    (`ImageLossGap.log_values`) if that is measured, the losses with and without images
    (`LossByKind.log_values`) if there are rows without, and, if ``scores_fn`` is given, its metrics
    (``eval_accuracy``, ...).
    """
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    # Sum of weighted losses, and of weights.
    total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    losses: list[RowLoss] = []
    with recorded_outputs(model) as outputs:
        for inputs, weight in eval_batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer.prepare_inputs(inputs))
            total += torch.stack([loss.double() * weight, torch.full_like(loss, weight, dtype=torch.float64)])
            if weight and (eval_batches.can_swap or eval_batches.has_text_only):
                losses += row_losses(outputs[-1])
            outputs.clear()
    loss_sum, weight_sum = trainer.accelerator.reduce(total).tolist()
    metrics = {"eval_loss": loss_sum / weight_sum}
    gap, by_kind = gap_to_swapped(trainer, eval_batches, losses), loss_by_kind(eval_batches, losses)
    for measured in (gap, by_kind):
        if measured is not None:
            metrics |= measured.log_values()
    if scores_fn is not None:
        metrics |= {f"eval_{name}": value for name, value in scores_fn().items()}
    model.eval()  # TRL logs its own metrics as evaluation ones only in this mode
    trainer.log(dict(metrics))
    model.train(was_training)
    return metrics


# --- the best adapter ---


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
        "best": {"step": state.best_global_step, result_key(recipe.eval.metric): state.best_metric},
        "kept": recipe.eval.keep,
    }
