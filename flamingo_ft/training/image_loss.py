"""Measure how much of the held-out loss the images explain (`ImageLossGap`).

Only forward passes in evaluation mode, without random numbers: training does not change by a bit.

Shapes: B rows, T text tokens, N label tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.evaluation.image_loss_gap import ImageLossGap

from .eval_batches import EvalBatches
from .interruptions import oom_as_user_error

RowLoss = tuple[float, int]  # nats, summed over the label tokens of a row; how many there are


@torch.no_grad()
def measure_image_loss_gap(trainer: Any, eval_batches: EvalBatches) -> ImageLossGap | None:
    """Measure the gap of the trainer's model in two passes; None if no row's images can be swapped.

    Collective.
    """
    if not eval_batches.can_swap:
        return None
    with trainer.meter.paused(), oom_as_user_error("evaluation"):
        return gap_to_swapped(trainer, eval_batches, _losses(trainer, eval_batches))


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
            losses += row_losses(output, inputs["labels"])
    model.train(was_training)
    return losses


def row_losses(output: Any, labels: Tensor) -> list[RowLoss]:
    """Return the loss of each row of ``labels`` (B, T).

    output: that of TRL's fused head on label positions alone, whose ``log_probs`` are (1, N).
    """
    has_label = labels.cpu()[:, 1:] != IGNORED
    rows = has_label.nonzero()[:, 0]
    # In float64 and on the CPU, where sums do not depend on an order of threads: equal losses stay equal.
    sums = torch.zeros(len(labels), dtype=torch.float64)
    sums.index_add_(0, rows, -output.log_probs[0].cpu().double())
    return list(zip(sums.tolist(), has_label.sum(1).tolist(), strict=True))


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


class LogGapBefore(TrainerCallback):
    """Logs the gap before the first step, where the curve begins; a resumed run has it in its log."""

    def __init__(self, trainer: Any, eval_batches: EvalBatches):
        self.trainer, self.eval_batches = trainer, eval_batches

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            gap = measure_image_loss_gap(self.trainer, self.eval_batches)
            if gap is not None:
                self.trainer.log(gap.log_values())


def final_gap(trainer: Any, recipe: Recipe, eval_batches: EvalBatches) -> ImageLossGap | None:
    """Return the gap of the model that the run ends with: the logged one or, if there is none, a new one."""
    state = trainer.state
    step = state.best_global_step if recipe.eval.keep == "best" else state.global_step
    logged = (ImageLossGap.of_log(entry) for entry in reversed(state.log_history) if entry["step"] == step)
    known = next((gap for gap in logged if gap is not None), None)
    return known or measure_image_loss_gap(trainer, eval_batches)
