"""The batches of a recipe: endless training batches, and each held-out sample once for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.batches import Batches, LoaderConfig, one_sample_per_row, packed_rows, sorted_by_length
from flamingo_ft.data.collate import collate_packed, collate_text, stack_media
from flamingo_ft.data.encode import IGNORED, Dropped, Encoded
from flamingo_ft.data.examples import DataStats, Example, ExampleDataset
from flamingo_ft.data.feature_cache import FeatureCache, collate_frames, open_feature_cache
from flamingo_ft.data.media import CachedFeatureLoader, PixelLoader
from flamingo_ft.data.opened_data import check_method, encoder
from flamingo_ft.data.pairs import EncodedPair, collate_pairs, repeat_media
from flamingo_ft.data.sample import message_text
from flamingo_ft.data.sample_order import SampleIndex, SampleOrder
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.build import text_limit
from flamingo_ft.progress import Bars

from .preflight import autocast_dtype, check_packing

# A batch, and the weight of its loss in the mean: its number of label tokens (SFT) or of pairs (DPO).
WeightedBatch = tuple[dict[str, Tensor], int]


def make_train_batches(
    data: OpenedData,
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    recipe: Recipe,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Return the endless training batches of process ``rank`` of ``world_size``.

    Raises UserError if the data do not fit ``train.method``, or the language model cannot pack.
    """
    check_method(data.train, recipe.train.method)
    data_config, batch_size = recipe.data, recipe.train.batch_size
    limit = text_limit(model.config, data_config.max_text_tokens)
    if data_config.packing:
        check_packing(model, batch_size)
    features = _feature_cache(model, processor, recipe, world_size)
    encode = encoder(processor, recipe, limit)
    order = SampleOrder(data.train, recipe.train.seed, data_config.shuffle_buffer)
    read_media = _media_reader(processor, recipe, features)
    collate = COLLATE[recipe.train.method]
    return Batches(
        order=_draws(order, data, recipe),
        dataset=ExampleDataset([weighted.source for weighted in data.train], encode, read_media),
        group_rows=packed_rows(batch_size, limit) if data_config.packing else one_sample_per_row(batch_size),
        collate=partial(collate, processor.tokenizer.pad_token_id, data_config.packing, features),
        stats=DataStats(data_config.on_bad_sample == "skip", data_config.max_bad_share, order.epoch_length),
        loading=LoaderConfig(batch_size, recipe.train.num_workers, rank, world_size),
    )


def collate_samples(
    pad_token_id: int, packing: bool, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch; each row is one sample, or several if they are packed."""
    texts = [[cast(Encoded, sample.encoded) for sample in row] for row in rows]
    if packing:
        text = collate_packed(texts, pad_token_id)
    else:
        text = collate_text([encoded for (encoded,) in texts], pad_token_id)
    return text | _collate_media(features, rows)


def collate_preferences(
    pad_token_id: int, packing: bool, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch of pairs, one per row: all chosen answers, then all rejected ones."""
    text = collate_pairs([cast(EncodedPair, pair.encoded) for (pair,) in rows], pad_token_id)
    return text | repeat_media(_collate_media(features, rows))


COLLATE = {"sft": collate_samples, "dpo": collate_preferences}


def _collate_media(features: FeatureCache | None, rows: list[list[Example]]) -> dict[str, Tensor]:
    media = [[medium for sample in row for medium in sample.media] for row in rows]
    return stack_media(media) if features is None else features.complete(collate_frames(media))


def _feature_cache(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, recipe: Recipe, writers: int
) -> FeatureCache | None:
    """Open the feature cache of the frozen vision tower; None without ``data.cache``."""
    if recipe.data.cache is None:
        return None
    autocast = autocast_dtype(recipe.train.precision)
    preprocess = processor.image_processor.open_clip_preprocess
    return open_feature_cache(model, preprocess, recipe.data.cache, autocast=autocast, writers=writers)


def _media_reader(
    processor: FlamingoProcessor, recipe: Recipe, features: FeatureCache | None
) -> PixelLoader | CachedFeatureLoader:
    if features is not None:
        return CachedFeatureLoader(processor, features.store)
    return PixelLoader(processor, recipe.data.augmentation, recipe.train.seed)


def _draws(order: SampleOrder, data: OpenedData, recipe: Recipe) -> Callable[[int], Any]:
    """Return a function from a position to the samples from there on, grouped by length if configured."""
    if not recipe.data.group_by_length:
        return order.indices
    return sorted_by_length(order, partial(_text_length, data), recipe.train.batch_size)


def _text_length(data: OpenedData, index: SampleIndex) -> int:
    """Return the approximate number of characters of a sample, before it is encoded; 0 if it is bad."""
    source = data.train[index.source].source
    try:
        sample = source.sample(index.row, source.raw(index.row) if index.raw is None else index.raw)
    except UserError:
        return 0
    return sum(len(message_text(message)) for message in [*sample.messages, *(sample.rejected or ())])


# --- evaluation batches ---


class EvalBatches:
    """The weighted batches of the held-out samples: each sample once, always in the same order.

    Process ``rank`` of ``world_size`` (None: this process) gets every ``world_size``-th batch. All processes
    get the same number of batches; the last one may be a repetition with weight 0.

    Raises UserError for samples that ``data.too_long`` refuses, for samples without a rejected answer if
    ``train.method`` is dpo, and if no sample has label tokens.
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
                "eval.steps: no held-out sample has label tokens; set eval.steps to null, or fix data.eval"
            )
        kept.sort(key=lambda pair: pair[1].text_tokens)  # little padding; the sort is stable
        size = recipe.eval.batch_size
        self._batches = [kept[start : start + size] for start in range(0, len(kept), size)]
        self._read_media = PixelLoader(processor)
        self._collate = partial(COLLATE[recipe.train.method], processor.tokenizer.pad_token_id, False, None)
        self._weight = WEIGHTS[recipe.train.method]
        self._progress = progress
        self._rank = processes.rank() if rank is None else rank
        self._world_size = world_size or processes.world_size()

    def __iter__(self) -> Iterator[WeightedBatch]:
        rounds = -(-len(self._batches) // self._world_size)
        indices = range(self._rank, rounds * self._world_size, self._world_size)
        for index in indices if self._progress is None else _with_bar(self._progress, indices):
            batch = self._batches[min(index, len(self._batches) - 1)]
            rows = [
                [Example(sample.where, text, self._read_media(sample, text.images, 0))]
                for sample, text in batch
            ]
            inputs = self._collate(rows)
            yield inputs, self._weight(inputs) if index < len(self._batches) else 0


def _with_bar(progress: Bars, indices: range) -> Iterator[int]:
    """Iterate over ``indices`` with a progress bar that is removed at the end."""
    bar = progress.add_task("held-out loss", total=len(indices), note="")
    for index in indices:
        yield index
        progress.advance(bar)
    progress.remove_task(bar)


def _refuse_single_answers(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not sample.rejected:
            raise UserError(
                f"{sample.where}: got one answer, but eval.steps compares two if train.method is dpo; "
                "use preference pairs in data.eval, or set eval.steps to null"
            )


def _count_label_tokens(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def _count_pairs(inputs: dict[str, Tensor]) -> int:
    return len(inputs["input_ids"]) // 2


WEIGHTS = {"sft": _count_label_tokens, "dpo": _count_pairs}
