"""The training batches of a recipe: order, encoding, media, packing and collation put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.collate import collate_text
from flamingo_ft.data.encode import text_of
from flamingo_ft.data.features import FrozenFeatures, open_features, pending_media
from flamingo_ft.data.media_reader import PixelReader, StoredReader
from flamingo_ft.data.methods import check_method, encoder
from flamingo_ft.data.packing import collate_packed
from flamingo_ft.data.pair import collate_pairs, twice
from flamingo_ft.data.stack import stack_media
from flamingo_ft.data.stream.batches import Batches, Loading, by_length, in_order, packed
from flamingo_ft.data.stream.order import Draw, Order
from flamingo_ft.data.stream.prepare import Prepared, Preparing
from flamingo_ft.data.stream.tally import Tally
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.backbone_files import text_limit

from .arguments import autocast_dtype
from .model_checks import check_packing


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
    features = _open_features(model, processor, recipe, world_size)
    encode = encoder(processor, recipe, limit)
    order = Order(data.train, recipe.train.seed, data_config.shuffle_buffer)
    read_media = _media_reader(processor, recipe, features)
    collate = COLLATE[recipe.train.method]
    return Batches(
        order=_draws(order, data, recipe),
        prepare=Preparing([mixed.source for mixed in data.train], encode, read_media),
        fill=packed(batch_size, limit) if data_config.packing else in_order(batch_size),
        assemble=partial(collate, processor.tokenizer.pad_token_id, data_config.packing, features),
        tally=Tally(data_config.on_bad_sample == "skip", data_config.max_bad_share, order.epoch_length),
        loading=Loading(batch_size, recipe.train.num_workers, rank, world_size),
    )


def collate_samples(
    pad_token_id: int, packing: bool, features: FrozenFeatures | None, rows: list[list[Prepared]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch; each row is one sample, or several if they are packed."""
    texts = [[sample.encoded for sample in row] for row in rows]
    if packing:
        text = collate_packed(texts, pad_token_id)
    else:
        text = collate_text([encoded for (encoded,) in texts], pad_token_id)
    return text | _collate_media(features, rows)


def collate_preferences(
    pad_token_id: int, packing: bool, features: FrozenFeatures | None, rows: list[list[Prepared]]
) -> dict[str, Tensor]:
    """Return the tensors of a batch of preference pairs, one per row: all chosen answers, then all rejected ones."""
    text = collate_pairs([pair.encoded for (pair,) in rows], pad_token_id)
    return text | twice(_collate_media(features, rows))


COLLATE = {"sft": collate_samples, "dpo": collate_preferences}


def _collate_media(features: FrozenFeatures | None, rows: list[list[Prepared]]) -> dict[str, Tensor]:
    media = [[medium for sample in row for medium in sample.media] for row in rows]
    return stack_media(media) if features is None else features.complete(pending_media(media))


def _open_features(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, recipe: Recipe, writers: int
) -> FrozenFeatures | None:
    """Open the feature cache of the frozen vision tower; None without ``data.cache``."""
    if recipe.data.cache is None:
        return None
    autocast = autocast_dtype(recipe.train.precision)
    preprocess = processor.image_processor.open_clip_preprocess
    return open_features(model, preprocess, recipe.data.cache, autocast=autocast, writers=writers)


def _media_reader(
    processor: FlamingoProcessor, recipe: Recipe, features: FrozenFeatures | None
) -> PixelReader | StoredReader:
    if features is not None:
        return StoredReader(processor, features.store)
    return PixelReader(processor, recipe.data.augmentation, recipe.train.seed)


def _draws(order: Order, data: OpenedData, recipe: Recipe) -> Callable[[int], Any]:
    """Return a function from a position to the draws from there on, grouped by length if the recipe says so."""
    if not recipe.data.group_by_length:
        return order.draws
    return by_length(order, partial(_text_length, data), recipe.train.batch_size)


def _text_length(data: OpenedData, draw: Draw) -> int:
    """Return the approximate number of characters of a sample, before it is encoded; 0 if it is bad."""
    source = data.train[draw.source].source
    try:
        sample = source.sample(draw.row, source.raw(draw.row) if draw.raw is None else draw.raw)
    except UserError:
        return 0
    return sum(len(text_of(message)) for message in [*sample.messages, *(sample.rejected or ())])
