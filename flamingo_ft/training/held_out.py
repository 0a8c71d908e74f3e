"""Held-out samples or pairs during training: the loss on all of them, and how many questions about them are answered
rightly.

Nothing of it changes what training learns: no random numbers are drawn, and the model is put back into training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.encode import IGNORED, Dropped
from flamingo_ft.data.media import PixelLoader
from flamingo_ft.data.methods import encoder
from flamingo_ft.data.stream.examples import Example
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.backbone_files import text_limit
from flamingo_ft.progress import Bars

from .batches import ASSEMBLE

Weighed = tuple[
    dict[str, Tensor], int
]  # a batch, and over how much its loss is the mean: label tokens, or pairs


class HeldOut:
    """Iterate over it for batches of the held-out samples, each sample once, in one order, as process ``rank`` of
    ``world_size`` (None: this one) takes them. Every process gets as many batches; the last may be one that counts for nothing.

    Raises UserError for samples that the recipe's ``data.too_long`` refuses, for ones that are no pairs where
    ``train.method`` compares, and where none has anything to judge.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        recipe: Recipe,
        progress: Bars | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if recipe.train.method == "dpo":
            _refuse_single_answers(samples)
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        encode = encoder(processor, recipe, limit)
        encoded = [(sample, encode(sample)) for sample in samples]
        kept = [(sample, text) for sample, text in encoded if not isinstance(text, Dropped)]
        if not kept:
            raise UserError(
                "eval.steps: found no held-out sample with anything to learn; set it to null, or mend data.eval"
            )
        kept.sort(key=lambda one: one[1].text_tokens)  # stable; little padding
        size = recipe.eval.batch_size
        self._batches = [kept[start : start + size] for start in range(0, len(kept), size)]
        self._read = PixelLoader(processor)
        self._assemble = partial(ASSEMBLE[recipe.train.method], processor.tokenizer.pad_token_id, False, None)
        self._weigh = WEIGHTS[recipe.train.method]
        self._progress = progress
        self._rank = processes.rank() if rank is None else rank
        self._world_size = world_size or processes.world_size()

    def __iter__(self) -> Iterator[Weighed]:
        turns = -(-len(self._batches) // self._world_size)
        places = range(self._rank, turns * self._world_size, self._world_size)
        for place in places if self._progress is None else _shown(self._progress, places):
            batch = self._batches[min(place, len(self._batches) - 1)]
            rows = [
                [Example(sample.where, text, self._read(sample, text.images, 0))] for sample, text in batch
            ]
            inputs = self._assemble(rows)
            yield inputs, self._weigh(inputs) if place < len(self._batches) else 0


def _shown(progress: Bars, places: range) -> Iterator[int]:
    """The places, with a bar as long as they are gone through."""
    bar = progress.add_task("held-out loss", total=len(places), note="")
    for place in places:
        yield place
        progress.advance(bar)
    progress.remove_task(bar)


def _refuse_single_answers(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not sample.rejected:
            raise UserError(
                f"{sample.where}: found one answer; eval.steps compares two where train.method is dpo: "
                "name preference pairs in data.eval, or set eval.steps to null"
            )


def _label_tokens(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def _pairs(inputs: dict[str, Tensor]) -> int:
    return len(inputs["input_ids"]) // 2


WEIGHTS = {"sft": _label_tokens, "dpo": _pairs}


@torch.no_grad()
def judge(trainer: Any, held_out: HeldOut, share_right: Callable[[], float] | None) -> dict[str, float]:
    """``eval_loss``, the mean over all label tokens or pairs, and ``eval_accuracy`` in 0..1, where there is
    ``share_right``.

    They are logged while the model is in evaluation mode: by that TRL tells its figures of evaluation from training's.
    """
    model, training = trainer.model, trainer.model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)  # weighted losses, weights
    for inputs, weight in held_out:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        total += torch.stack([loss.double() * weight, torch.full_like(loss, weight, dtype=torch.float64)])
    loss_sum, weights = trainer.accelerator.reduce(total).tolist()
    metrics = {"eval_loss": loss_sum / weights}
    if share_right is not None:
        metrics["eval_accuracy"] = share_right()
    model.eval()
    trainer.log(dict(metrics))
    model.train(training)
    return metrics
