"""The batches of the held-out samples, and the same batches with the images swapped between samples."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.encode import IGNORED, Dropped, Encoded
from flamingo_ft.data.examples import Example
from flamingo_ft.data.feature_cache import FeatureCache
from flamingo_ft.data.media import CachedFeatureLoader, PixelLoader
from flamingo_ft.data.opened_data import encoder
from flamingo_ft.data.pairs import EncodedPair
from flamingo_ft.data.unpaired import labelled_answers
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import with_other_images
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.build import text_limit
from flamingo_ft.progress import Bars

from .dataloader import collate_fn

# The held-out loss of GRPO is that of SFT: its own would need sampled answers.
LOSS_OF = {"grpo": "sft"}
# A batch, and the weight of its loss in the mean: its number of label tokens (SFT, GRPO), of pairs (DPO) or
# of answers (KTO).
WeightedBatch = tuple[dict[str, Tensor], int]


@dataclass(frozen=True)
class EvalRow:
    """A held-out sample with what its text becomes, and the sample whose images it is shown when swapped.

    swapped: whether ``other`` has none of the sample's own images.
    """

    sample: Sample
    text: Encoded | EncodedPair
    other: Sample
    swapped: bool = False


class EvalBatches:
    """The weighted batches of the held-out samples: each sample once, always in the same order.

    The order is by length; with kto, whose loss pairs neighbours, it is random and follows from the seed.

    Process ``rank`` of ``world_size`` (None: this process) gets every ``world_size``-th batch. All processes
    get the same number of batches; the last one may be a repetition with weight 0. With ``features``, the
    vision tower encodes only images that are not cached. method: whose batches they are, by default those of
    the recipe's.

    Raises UserError for samples that ``data.too_long`` refuses, for samples without a rejected answer if
    the method is dpo, without a label if it is kto, and if no sample has label tokens; with
    ``skip_unusable``, such samples are left out instead.
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
        features: FeatureCache | None = None,
        skip_unusable: bool = False,
        method: str | None = None,
    ):
        method = method or LOSS_OF.get(recipe.train.method, recipe.train.method)
        samples = _compared_samples(samples, method)
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        encode = encoder(processor, recipe, limit, method)
        rows = _encoded_rows(samples, _dropping_unusable(encode) if skip_unusable else encode)
        if not rows and not skip_unusable:
            raise UserError(
                "eval.steps: no held-out sample has label tokens; set eval.steps to null, or fix data.eval"
            )
        if measures_image_loss_gap(recipe):
            rows = _with_others(rows, recipe.train.seed)
        if method == "kto":
            # Sorted by length, both answers to a prompt would often be neighbours, which KTO pairs.
            random.Random(recipe.train.seed).shuffle(rows)
            self._batches = _without_single_row(_batched(rows, recipe.eval.batch_size))
        else:
            rows.sort(key=lambda row: row.text.text_tokens)  # little padding; the sort is stable
            self._batches = _batched(rows, recipe.eval.batch_size)
        self._read_media = (
            PixelLoader(processor) if features is None else CachedFeatureLoader(processor, features.store)
        )
        self._collate = collate_fn(recipe, processor, limit, features, method=method)
        self._weight = WEIGHTS[method]
        self._has_row_losses = method == "sft"
        self._progress, self._title = progress, "held-out loss"
        self._rank = processes.rank() if rank is None else rank
        self._world_size = world_size or processes.world_size()

    def __iter__(self) -> Iterator[WeightedBatch]:
        indices = self._indices()
        for index in indices if self._progress is None else _with_bar(self._progress, self._title, indices):
            batch = self._batches[min(index, len(self._batches) - 1)]
            rows = [
                [Example(row.sample.where, row.text, self._read_media(row.sample, row.text.images, 0))]
                for row in batch
            ]
            inputs = self._collate(rows)
            yield inputs, self._weight(inputs) if index < len(self._batches) else 0

    def _indices(self) -> range:
        """The numbers of this process's batches; those beyond the last one are repetitions."""
        rounds = -(-len(self._batches) // self._world_size)
        return range(self._rank, rounds * self._world_size, self._world_size)

    # --- the same batches with other images ---

    @property
    def can_swap(self) -> bool:
        """Whether any row, in any process, can be shown other images."""
        return any(row.swapped for batch in self._batches for row in batch)

    @property
    def has_text_only(self) -> bool:
        """Whether any row, in any process, has no images; never in DPO and KTO, whose losses are relative."""
        return self._has_row_losses and any(row.text.images == 0 for batch in self._batches for row in batch)

    @property
    def own_rows(self) -> list[EvalRow]:
        """The rows of this process's batches in their order, without repetitions."""
        return [
            row for index in self._indices() for batch in self._batches[index : index + 1] for row in batch
        ]

    def with_images_swapped(self) -> EvalBatches:
        """Return the same batches with the images of `EvalRow.other`; other rows keep their own.

        Rows stay at their places, so that a loss differs from the original one by the images alone.
        """
        swapped = copy.copy(self)
        swapped._batches = [[_with_swapped_images(row) for row in batch] for batch in self._batches]
        swapped._title = "held-out loss with another image"
        return swapped


def measures_image_loss_gap(recipe: Recipe) -> bool:
    """Whether evaluations compare the loss with that of swapped images.

    Not in DPO and KTO: their loss is relative to a reference model that sees the same images.
    """
    return recipe.eval.shuffled_images and recipe.train.method in ("sft", "grpo")


def _batched(rows: Sequence[EvalRow], size: int) -> list[list[EvalRow]]:
    return [[*rows[start : start + size]] for start in range(0, len(rows), size)]


def _without_single_row(batches: list[list[EvalRow]]) -> list[list[EvalRow]]:
    """Return the batches, the last row not alone: KTO pairs it with another one of its batch."""
    if len(batches) < 2 or len(batches[-1]) > 1 or len(batches[0]) == 1:
        return batches
    rows = batches[-2] + batches[-1]
    half = len(rows) // 2
    return [*batches[:-2], *([rows[:half], rows[half:]] if half > 1 else [rows])]


def _encoded_rows(samples: Sequence[Sample], encode: Callable[[Sample], Any]) -> list[EvalRow]:
    encoded = [(sample, encode(sample)) for sample in samples]
    return [EvalRow(sample, text, sample) for sample, text in encoded if not isinstance(text, Dropped)]


def _dropping_unusable(encode: Callable[[Sample], Any]) -> Callable[[Sample], Any]:
    def dropping(sample: Sample) -> Any:
        try:
            return encode(sample)
        except UserError as error:
            return Dropped(str(error))

    return dropping


def _with_others(rows: Sequence[EvalRow], seed: int) -> list[EvalRow]:
    """Assign each row another sample's images, as many as are left in its text."""
    samples = [replace(row.sample, images=row.sample.images[: row.text.images]) for row in rows]
    others = with_other_images(samples, seed)
    return [
        replace(row, other=other, swapped=bool(own.images) and set(own.images).isdisjoint(other.images))
        for row, own, other in zip(rows, samples, others, strict=True)
    ]


def _with_swapped_images(row: EvalRow) -> EvalRow:
    return replace(row, sample=row.other) if row.swapped else row


def _with_bar(progress: Bars, title: str, indices: range) -> Iterator[int]:
    """Iterate over ``indices`` with a progress bar that is removed at the end."""
    bar = progress.add_task(title, total=len(indices), note="")
    for index in indices:
        yield index
        progress.advance(bar)
    progress.remove_task(bar)


def _compared_samples(samples: Sequence[Sample], method: str) -> list[Sample]:
    """Return the samples; with kto, each preference pair as two labelled answers.

    Raises UserError for a sample that ``method`` cannot compare with anything.
    """
    for sample in samples:
        if method == "dpo" and not sample.rejected:
            raise UserError(
                f"{sample.where}: got one answer, but eval.steps compares two if train.method is dpo; "
                "use preference pairs in data.eval, or set eval.steps to null"
            )
        if method == "kto" and not sample.rejected and sample.label is None:
            raise UserError(
                f"{sample.where}: got an answer without a label, which eval.steps needs if train.method is "
                "kto; use labelled answers or preference pairs in data.eval, or set eval.steps to null"
            )
    if method != "kto":
        return list(samples)
    return [answer for sample in samples for answer in labelled_answers(sample)]


def _count_label_tokens(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def _count_pairs(inputs: dict[str, Tensor]) -> int:
    return len(inputs["input_ids"]) // 2


def _count_answers(inputs: dict[str, Tensor]) -> int:
    return len(inputs["input_ids"])


WEIGHTS = {"sft": _count_label_tokens, "dpo": _count_pairs, "kto": _count_answers}
