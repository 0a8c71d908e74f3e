"""The length of an epoch in samples and optimizer steps."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import islice
from typing import Any, cast

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.model.build import backbone_files, text_limit

from .collate import pack
from .encode import Dropped
from .methods import encoder
from .opened_data import OpenedData
from .render import apply_template
from .stream.order import SampleIndex, SampleOrder

PACKED_SAMPLES = 1_000  # encoded to estimate how many samples fit into a packed row


def with_max_steps(recipe: Recipe, data: OpenedData) -> Recipe:
    """The recipe with ``train.epochs`` converted to ``train.max_steps``; the recipe itself where that is
    given.

    Raises UserError for a streamed source, whose length is not known.
    """
    epochs = recipe.train.epochs
    if epochs is None:
        return recipe
    per_epoch = steps_per_epoch(recipe, data)
    if per_epoch is None:
        raise UserError(
            f"train.epochs: got {epochs:g}, but a streamed source has no known length; use train.max_steps"
        )
    steps = max(1, math.ceil(exact_fraction(epochs) * per_epoch))
    train = recipe.train.model_copy(update={"max_steps": steps, "epochs": None})
    return recipe.model_copy(update={"train": train})


def steps_per_epoch(recipe: Recipe, data: OpenedData) -> Fraction | None:
    """Optimizer steps in which every training row is drawn once, those of a source of weight w w times on
    average.

    Fractional: an epoch may end within a step. None where a source is streamed. With ``data.packing`` it is
    estimated.
    """
    length = samples_per_epoch(recipe, data)
    if length is None:
        return None
    rows = length * _rows_per_sample(recipe, data) if recipe.data.packing else Fraction(length)
    train = recipe.train
    return rows / (train.batch_size * train.gradient_accumulation_steps * processes.world_size())


def samples_per_epoch(recipe: Recipe, data: OpenedData) -> int | None:
    """Samples, or pairs, that are drawn in one epoch; None where a source is streamed."""
    return SampleOrder(data.train, recipe.train.seed).epoch_length


def exact_fraction(number: float) -> Fraction:
    """The decimal fraction that a recipe spells: 0.1 of 30 steps are 3, not 3.0000000000000004 rounded up
    to 4."""
    return Fraction(repr(number))


def _rows_per_sample(recipe: Recipe, data: OpenedData) -> Fraction:
    """Packed rows per drawn sample, of the first samples of the run."""
    files = backbone_files(recipe.model)
    processor = files.processor()
    apply_template(processor, recipe.data)
    limit = text_limit(files.language, recipe.data.max_text_tokens)
    encode = encoder(processor, recipe, limit)
    order = SampleOrder(data.train, recipe.train.seed)
    length = cast(int, order.epoch_length)  # None only where a source is streamed; the caller excludes that
    draws = list(islice(order.indices(), min(PACKED_SAMPLES, length)))
    sizes = [size for draw in draws if (size := _size(data, draw, encode)) is not None]
    rows = sum(1 for _ in pack(sizes, int, limit))
    return Fraction(max(1, rows), len(draws))


def _size(data: OpenedData, draw: SampleIndex, encode: Any) -> int | None:
    """Text tokens of a drawn sample; None for one that is skipped or dropped."""
    source = data.train[draw.source].source
    try:
        encoded = encode(source.sample(draw.row, source.raw(draw.row)))
    except UserError:
        return None
    return None if isinstance(encoded, Dropped) else encoded.text_tokens
