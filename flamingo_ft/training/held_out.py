"""Held-out samples during training: the loss on all of them, and how many questions about them are answered rightly.

Nothing of it changes what training learns: no random numbers are drawn, and the model is put back into training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.media_reader import PixelReader
from flamingo_ft.data.stream.prepare import Prepared
from flamingo_ft.data.too_long import Dropped, encode_within
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from . import processes
from .backbone_files import text_limit
from .batches import assemble

Weighed = tuple[dict[str, Tensor], int]  # a batch, and how many label tokens its mean loss is over


class HeldOut:
    """Iterate over it for batches of the held-out samples, each sample once, in one order, as process ``rank`` of
    ``world_size`` (None: this one) takes them. Every process gets as many batches; the last may be one that counts for nothing.

    Raises UserError for samples that the recipe's ``data.too_long`` refuses, and where none has anything to judge.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        recipe: Recipe,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        encode = partial(encode_within, processor, max_text_tokens=limit, policy=recipe.data.too_long)
        encoded = [(sample, encode(sample)) for sample in samples]
        kept = [(sample, text) for sample, text in encoded if not isinstance(text, Dropped)]
        if not kept:
            raise UserError("eval.steps: found no held-out sample with anything to learn; set it to null, or mend data.eval")
        kept.sort(key=lambda pair: len(pair[1].input_ids))  # stable; little padding
        size = recipe.eval.batch_size
        self._batches = [kept[start : start + size] for start in range(0, len(kept), size)]
        self._read = PixelReader(processor)
        self._assemble = partial(assemble, processor.tokenizer.pad_token_id, False, None)
        self._rank = processes.rank() if rank is None else rank
        self._world_size = world_size or processes.world_size()

    def __iter__(self) -> Iterator[Weighed]:
        turns = -(-len(self._batches) // self._world_size)
        for place in range(self._rank, turns * self._world_size, self._world_size):
            batch = self._batches[min(place, len(self._batches) - 1)]
            rows = [[Prepared(sample.where, text, self._read(sample, text.images, 0))] for sample, text in batch]
            inputs = self._assemble(rows)
            labels = int((inputs["labels"][:, 1:] != IGNORED).sum())
            yield inputs, labels if place < len(self._batches) else 0


@torch.no_grad()
def judge(trainer: Any, held_out: HeldOut, share_right: Callable[[], float] | None) -> dict[str, float]:
    """``eval_loss``, the mean over all label tokens, and ``eval_accuracy`` in 0..1, where there is ``share_right``.

    They are logged while the model is in evaluation mode: by that TRL tells its figures of evaluation from training's.
    """
    model, training = trainer.model, trainer.model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)  # loss over tokens, tokens
    for inputs, labels in held_out:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        total += torch.stack([loss.double() * labels, torch.full_like(loss, labels, dtype=torch.float64)])
    loss_sum, tokens = trainer.accelerator.reduce(total).tolist()
    metrics = {"eval_loss": loss_sum / tokens}
    if share_right is not None:
        metrics["eval_accuracy"] = share_right()
    model.eval()
    trainer.log(dict(metrics))
    model.train(training)
    return metrics
