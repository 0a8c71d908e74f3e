"""The batches that a recipe trains on."""

from __future__ import annotations

from functools import partial

from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.collate import collate
from flamingo_ft.data.encode import Encoder
from flamingo_ft.data.packing import check_packing, packed
from flamingo_ft.data.pixel_reader import PixelReader
from flamingo_ft.data.stream.batches import Batches, Loading, by_length, in_order
from flamingo_ft.data.stream.order import Draw, Order
from flamingo_ft.data.stream.prepare import Preparing
from flamingo_ft.data.stream.tally import Tally
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor


def training_batches(
    data: OpenedData,
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    recipe: Recipe,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Endless batches of ``data``, those of process ``rank`` of ``world_size``. UserError for a wish that cannot be had."""
