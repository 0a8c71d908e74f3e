"""Measure how much of the held-out loss the images explain (`ImageLossGap`), and that of rows without images.

Only forward passes in evaluation mode, without random numbers: training does not change by a bit.

Shapes: B rows, T text tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.evaluation.image_loss_gap import ImageLossGap
from flamingo_ft.evaluation.loss_by_kind import LossByKind

from .eval_batches import EvalBatches, measures_image_loss_gap
from .interruptions import oom_as_user_error

RowLoss = tuple[float, int]  # nats, summed over the label tokens of a row; how many there are


@dataclass(frozen=True)
class HeldOutLosses:
    """Held-out losses: the part that the images explain, and by kind of row; None if not measured."""

    gap: ImageLossGap | None
    by_kind: LossByKind | None

    def log_values(self) -> dict[str, float]:
        """Return the keys and values of a log entry; empty if nothing was measured."""
        measured = [one.log_values() for one in (self.gap, self.by_kind) if one is not None]
        return {key: value for values in measured for key, value in values.items()}


@torch.no_grad()
def measure_losses(trainer: Any, eval_batches: EvalBatches, gap: bool = True) -> HeldOutLosses:
    """Measure the losses of the trainer's model; for the gap, in a second pass. Collective."""
    with trainer.meter.paused(), oom_as_user_error("evaluation"):
        gap = gap and eval_batches.can_swap
        if not (gap or eval_batches.has_text_only):
            return HeldOutLosses(None, None)
        losses = _losses(trainer, eval_batches)
        return HeldOutLosses(
            gap_to_swapped(trainer, eval_batches, losses) if gap else None,
            loss_by_kind(eval_batches, losses),
        )


def loss_by_kind(eval_batches: EvalBatches, losses: Sequence[RowLoss]) -> LossByKind | None:
    """Return the losses of rows with and without images, given those of this process's rows in their order.

    None if all rows have images. Collective.
    """
    if not eval_batches.has_text_only:
        return None
    rows = [
        (row.text.images > 0, loss, tokens)
        for row, (loss, tokens) in zip(eval_batches.own_rows, losses, strict=True)
    ]
    return LossByKind.of_rows([row for own in processes.all_gather(rows) for row in own])


@torch.no_grad()
def gap_to_swapped(
    trainer: Any, eval_batches: EvalBatches, true_losses: Sequence[RowLoss]
) -> ImageLossGap | None:
    """Compare ``true_losses``, of this process's rows in their order, with those of swapped images.

    Rows whose images cannot be swapped do not count: those without any, and those for which no other sample
    has as many images that are all different. None if no row is left. Collective.
    """
    if not eval_batches.can_swap:
        return None
    swapped_losses = _losses(trainer, eval_batches.with_images_swapped())
    pairs = [
        (true, swapped, tokens)
        for row, (true, tokens), (swapped, _) in zip(
            eval_batches.own_rows, true_losses, swapped_losses, strict=True
        )
        if row.swapped
    ]
    all_pairs = [pair for own in processes.all_gather(pairs) for pair in own]
    return ImageLossGap.of_losses(*zip(*all_pairs, strict=True))


def _losses(trainer: Any, eval_batches: EvalBatches) -> list[RowLoss]:
    """Compute the loss of each row of this process."""
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    losses: list[RowLoss] = []
    for inputs, weight in eval_batches:
        with trainer.compute_loss_context_manager():
            output = trainer.score_labels(trainer.prepare_inputs(inputs))
        if weight:
            losses += row_losses(output)
    model.train(was_training)
    return losses


def row_losses(output: Any) -> list[RowLoss]:
    """Return the loss of each row of a batch, from what TRL's fused head returned for it."""
    # In float64 and on the CPU, where sums do not depend on an order of threads: equal losses stay equal.
    losses = -output.log_probs.cpu().double().sum(1)
    return list(zip(losses.tolist(), output.label_mask.sum(1).tolist(), strict=True))


@contextmanager
def recorded_outputs(model: nn.Module) -> Generator[list[Any]]:
    """Collect the outputs of the model's forward passes, which Trainer's ``compute_loss`` keeps to itself."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


# --- before and after training ---


class LogLossesBefore(TrainerCallback):
    """Logs the losses before the first step, where their curves begin; a resumed run has them in its log.

    gap: whether that to the loss of swapped images is among them.
    """

    def __init__(self, trainer: Any, eval_batches: EvalBatches, gap: bool):
        self.trainer, self.eval_batches, self.gap = trainer, eval_batches, gap

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            values = measure_losses(self.trainer, self.eval_batches, self.gap).log_values()
            if values:
                self.trainer.log(values)


def logged_losses(trainer: Any, step: int | None) -> HeldOutLosses:
    """Return the newest logged losses of the model after ``step`` optimizer steps."""
    entries = [entry for entry in reversed(trainer.state.log_history) if entry["step"] == step]
    gaps = (ImageLossGap.of_log(entry) for entry in entries)
    kinds = (LossByKind.of_log(entry) for entry in entries)
    return HeldOutLosses(
        next((gap for gap in gaps if gap is not None), None),
        next((kind for kind in kinds if kind is not None), None),
    )


def final_losses(trainer: Any, recipe: Recipe, eval_batches: EvalBatches) -> HeldOutLosses:
    """Return the losses of the model that the run ends with: the logged ones or, without any, new ones."""
    state, gap = trainer.state, measures_image_loss_gap(recipe)
    step = state.best_global_step if recipe.eval.keep == "best" else state.global_step
    logged = logged_losses(trainer, step)
    is_gap_known = logged.gap is not None or not (gap and eval_batches.can_swap)
    if is_gap_known and (logged.by_kind is not None or not eval_batches.has_text_only):
        return logged
    return measure_losses(trainer, eval_batches, gap)
