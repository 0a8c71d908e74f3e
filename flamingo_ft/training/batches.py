"""The batches that a recipe trains on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.collate import collate_packed, collate_text, stack_media
from flamingo_ft.data.features import FeatureCache, collate_frames, open_feature_cache
from flamingo_ft.data.media import CachedFeatureLoader, PixelLoader
from flamingo_ft.data.methods import check_method, encoder
from flamingo_ft.data.pairs import collate_pairs, repeat_media
from flamingo_ft.data.sample import message_text
from flamingo_ft.data.stream.batches import (
    Batches,
    LoaderConfig,
    one_sample_per_row,
    packed_rows,
    sorted_by_length,
)
from flamingo_ft.data.stream.examples import DataStats, Example, ExampleDataset
from flamingo_ft.data.stream.order import SampleIndex, SampleOrder
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.backbone_files import text_limit

from .packing_check import check_packing
from .precision import computes_in


def training_batches(
    data: OpenedData,
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    recipe: Recipe,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Endless batches of ``data``, those of process ``rank`` of ``world_size``.

    Raises UserError where the recipe wants of its data or its language model what they cannot give.
    """
    check_method(data.train, recipe.train.method)
    wanted, limit = recipe.data, text_limit(model.config, recipe.data.max_text_tokens)
    if wanted.packing:
        check_packing(model, recipe.train.batch_size)
    features = _features(model, processor, recipe, world_size)
    encode = encoder(processor, recipe, limit)
    order = SampleOrder(data.train, recipe.train.seed, wanted.shuffle_buffer)
    return Batches(
        order=_order_of(order, data, recipe),
        prepare=ExampleDataset(
            [mixed.source for mixed in data.train], encode, _media_reader(processor, recipe, features)
        ),
        fill=packed_rows(recipe.train.batch_size, limit)
        if wanted.packing
        else one_sample_per_row(recipe.train.batch_size),
        assemble=partial(
            ASSEMBLE[recipe.train.method], processor.tokenizer.pad_token_id, wanted.packing, features
        ),
        stats=DataStats(wanted.on_bad_sample == "skip", wanted.max_bad_share, order.epoch_length),
        loading=LoaderConfig(recipe.train.batch_size, recipe.train.num_workers, rank, world_size),
    )


def assemble(
    pad_token_id: int, packing: bool, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """The tensors of a batch of ``rows``, each of one sample, or of several where they are packed."""
    texts = [[sample.encoded for sample in row] for row in rows]
    text = (
        collate_packed(texts, pad_token_id)
        if packing
        else collate_text([one for (one,) in texts], pad_token_id)
    )
    return text | _media(features, rows)


def assemble_pairs(
    pad_token_id: int, packing: bool, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """The tensors of a batch of pairs, one to a row, the chosen halves before the rejected ones."""
    text = collate_pairs([pair.encoded for (pair,) in rows], pad_token_id)
    return text | repeat_media(_media(features, rows))


ASSEMBLE = {"sft": assemble, "dpo": assemble_pairs}


def _media(features: FeatureCache | None, rows: list[list[Example]]) -> dict[str, Tensor]:
    media = [[medium for sample in row for medium in sample.media] for row in rows]
    return stack_media(media) if features is None else features.complete(collate_frames(media))


def _features(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, recipe: Recipe, writers: int
) -> FeatureCache | None:
    if recipe.data.cache is None:
        return None
    autocast = computes_in(recipe.train.precision)
    preprocess = processor.image_processor.open_clip_preprocess
    return open_feature_cache(model, preprocess, recipe.data.cache, autocast=autocast, writers=writers)


def _media_reader(processor: FlamingoProcessor, recipe: Recipe, features: FeatureCache | None) -> Any:
    if features is not None:
        return CachedFeatureLoader(processor, features.store)
    return PixelLoader(processor, recipe.data.augmentation, recipe.train.seed)


def _order_of(order: SampleOrder, data: OpenedData, recipe: Recipe) -> Callable[[int], Any]:
    if not recipe.data.group_by_length:
        return order.draws
    return sorted_by_length(order, partial(_characters, data), recipe.train.batch_size)


def _characters(data: OpenedData, draw: SampleIndex) -> int:
    """Of a draw's text, about: what its length is judged by before it is encoded."""
    source = data.train[draw.source].source
    try:
        sample = source.sample(draw.row, source.raw(draw.row) if draw.raw is None else draw.raw)
    except UserError:
        return 0
    return sum(len(message_text(message)) for message in [*sample.messages, *(sample.rejected or ())])
