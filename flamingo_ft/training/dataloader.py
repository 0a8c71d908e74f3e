"""The endless training batches of a recipe, and how rows become a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor

from flamingo_ft.backbones.precision import autocast_dtype
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.batches import Batches, LoaderConfig, one_sample_per_row, packed_rows, sorted_by_length
from flamingo_ft.data.box_writer import BoxWriter
from flamingo_ft.data.collate import collate_packed, collate_text
from flamingo_ft.data.encode import Encoded
from flamingo_ft.data.examples import DataStats, Example, ExampleDataset
from flamingo_ft.data.feature_cache import FeatureCache, collate_frames, open_feature_cache
from flamingo_ft.data.media import CachedFeatureLoader, PictureLoader, PixelLoader
from flamingo_ft.data.opened_data import check_method, encoder, training_sources
from flamingo_ft.data.pairs import EncodedPair, collate_pairs, repeat_media
from flamingo_ft.data.prompts import sampling_rows
from flamingo_ft.data.sample import message_text, with_widest_boxes
from flamingo_ft.data.sample_order import SampleIndex, SampleOrder, WeightedSource
from flamingo_ft.data.unpaired import EncodedAnswer, collate_answers
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.build import text_limit
from flamingo_ft.model.views import stack_media

from .preflight import check_packing


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
    sources = training_sources(data, recipe.train.method)
    data_config, batch_size = recipe.data, recipe.train.samples_per_batch
    limit = text_limit(model.config, data_config.max_text_tokens)
    if data_config.packing:
        check_packing(model, batch_size)
    features = _feature_cache(model, processor, recipe, world_size)
    encode = encoder(processor, recipe, limit)
    order = SampleOrder(sources, recipe.train.seed, data_config.shuffle_buffer)
    read_media = _media_reader(processor, recipe, features)
    write_boxes = BoxWriter(
        processor.image_processor, read_media if isinstance(read_media, PixelLoader) else None
    )
    dataset = ExampleDataset([weighted.source for weighted in sources], encode, read_media, write_boxes)
    return Batches(
        order=_draws(order, sources, recipe),
        dataset=dataset,
        group_rows=packed_rows(batch_size, limit) if data_config.packing else one_sample_per_row(batch_size),
        collate=collate_fn(recipe, processor, limit, features, packing=data_config.packing),
        stats=DataStats(data_config.on_bad_sample == "skip", data_config.max_bad_share, order.epoch_length),
        loading=LoaderConfig(batch_size, recipe.train.num_workers, rank, world_size),
        features=features,
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
    pad_token_id: int, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch of pairs, one per row: all chosen answers, then all rejected ones."""
    text = collate_pairs([cast(EncodedPair, pair.encoded) for (pair,) in rows], pad_token_id)
    return text | repeat_media(_collate_media(features, rows))


def collate_unpaired(
    pad_token_id: int, limit: int, features: FeatureCache | None, rows: list[list[Example]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch of labelled answers, one per row."""
    text = collate_answers([cast(EncodedAnswer, answer.encoded) for (answer,) in rows], pad_token_id, limit)
    return text | _collate_media(features, rows)


def collate_prompts(num_generations: int, rows: list[list[Example]]) -> list[dict[str, Any]]:
    """Return a batch of questions, one per row, as TRL's trainer takes them."""
    return sampling_rows([question for (question,) in rows], num_generations)


def collate_fn(
    recipe: Recipe,
    processor: FlamingoProcessor,
    limit: int,
    features: FeatureCache | None,
    packing: bool = False,
    method: str | None = None,
) -> Callable[[list[list[Example]]], Any]:
    """Return the function from the rows of a batch to the batch. method: by default the recipe's."""
    method, pad_token_id = method or recipe.train.method, processor.tokenizer.pad_token_id
    if method == "grpo":
        return partial(collate_prompts, recipe.train.grpo.num_generations)
    if method == "kto":
        return partial(collate_unpaired, pad_token_id, limit, features)
    if method == "dpo":
        return partial(collate_preferences, pad_token_id, features)
    return partial(collate_samples, pad_token_id, packing, features)


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
    preprocess = processor.image_processor.transform_record
    return open_feature_cache(model, preprocess, recipe.data.cache, autocast=autocast, writers=writers)


def _media_reader(
    processor: FlamingoProcessor, recipe: Recipe, features: FeatureCache | None
) -> PixelLoader | CachedFeatureLoader:
    if features is not None:
        return CachedFeatureLoader(processor, features.store)
    load = PictureLoader if recipe.train.method == "grpo" else PixelLoader
    return load(processor, recipe.data.augmentation, recipe.train.seed)


def _draws(order: SampleOrder, sources: Sequence[WeightedSource], recipe: Recipe) -> Callable[[int], Any]:
    """Return a function from a position to the samples from there on, grouped by length if configured."""
    if not recipe.data.group_by_length:
        return order.indices
    return sorted_by_length(order, partial(_text_length, sources), recipe.train.samples_per_batch)


def _text_length(sources: Sequence[WeightedSource], index: SampleIndex) -> int:
    """Return the approximate number of characters of a sample, before it is encoded; 0 if it is bad."""
    source = sources[index.source].source
    try:
        sample = source.sample(index.row, source.raw(index.row) if index.raw is None else index.raw)
    except UserError:
        return 0
    sample = with_widest_boxes(sample)
    return sum(len(message_text(message)) for message in [*sample.messages, *(sample.rejected or ())])
