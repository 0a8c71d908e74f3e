"""Measure the rewards of the held-out preference pairs after DPO or KTO (`PairRewards`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flamingo_ft import processes
from flamingo_ft.adapters.trainable import match_training_mode
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.evaluation.pair_rewards import PairRewards
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.progress import Bars

from .eval_batches import EvalBatches
from .interruptions import oom_as_user_error


def pair_batches(
    trainer: Any, samples: Sequence[Sample], processor: FlamingoProcessor, recipe: Recipe, progress: Bars
) -> EvalBatches | None:
    """Return the batches of the preference pairs among held-out samples, if the method compares answers.

    Unusable pairs are left out. A batch has no more pairs than one in training, whose memory is known to
    suffice.
    """
    pairs = [sample for sample in samples if sample.rejected]
    if recipe.train.method not in ("dpo", "kto") or not pairs:
        return None
    size = min(recipe.eval.batch_size, recipe.train.batch_size)
    return EvalBatches(
        pairs,
        trainer.model,
        processor,
        recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"batch_size": size})}),
        progress,
        features=trainer.batches.features,
        skip_unusable=True,
        method="dpo",
    )


@torch.no_grad()
def measure_pair_rewards(trainer: Any, eval_batches: EvalBatches, recipe: Recipe) -> PairRewards | None:
    """Compare the trainer's model with its reference on pairs; None if no pair is usable. Collective."""
    beta = getattr(recipe.train, recipe.train.method).beta
    trainer.model.eval()
    match_training_mode(trainer.ref_model, False)
    margins: list[float] = []
    with oom_as_user_error("evaluation"):
        for inputs, weight in eval_batches:
            inputs = trainer.prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                ratios = _log_probs(trainer.model, inputs) - _log_probs(trainer.ref_model, inputs)
            chosen, rejected = ratios.chunk(2)
            if weight:  # otherwise a repetition
                margins += (beta * (chosen - rejected)).tolist()
    gathered = [margin for own in processes.all_gather(margins) for margin in own]
    return PairRewards.of_margins(gathered) if gathered else None


def _log_probs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of each answer of a batch (2 P,), by TRL's fused head."""
    media = {name: tensor for name, tensor in inputs.items() if name != "completion_mask"}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
    output = model(**media, labels=labels, use_cache=False, fused_lm_head=True)
    return output.log_probs.double().sum(1)
