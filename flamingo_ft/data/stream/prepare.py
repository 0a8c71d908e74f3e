"""From a draw to what a batch is made of; this is the work that worker processes do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from flamingo_ft.data.encode import Encoded
from flamingo_ft.data.pair import EncodedPair
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.sources import Source
from flamingo_ft.data.too_long import Dropped
from flamingo_ft.errors import UserError

from .order import Draw
from .tally import LeftOut


@dataclass(frozen=True)
class Prepared:
    """A row that trains: its text in token ids, or both texts of a pair, and its media as tensors, in order."""

    where: str
    encoded: Encoded | EncodedPair
    media: list[Any]


class Preparing(Dataset):
    """From draws to `Prepared` rows, or `LeftOut` ones with the reason.

    encode: from a sample to its tokens, or why a policy drops it. read_media: from the sample, how many of its media are
    kept, and the draw's number, which seeds what is random, to their tensors.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[Sample], Encoded | EncodedPair | Dropped],
        read_media: Callable[[Sample, int, int], list[Any]],
    ):
        self.sources, self.encode, self.read_media = sources, encode, read_media

    def __getitem__(self, draw: Draw) -> Prepared | LeftOut:
        source = self.sources[draw.source]
        where = f"{source.name}: row {draw.row}"
        try:
            raw = source.raw(draw.row) if draw.raw is None else draw.raw
            where = source.where(raw)
            sample = source.sample(draw.row, raw)
            encoded = self.encode(sample)
            if isinstance(encoded, Dropped):
                return LeftOut(draw.number, where, encoded.reason, bad=False)
            return Prepared(where, encoded, self.read_media(sample, encoded.images, draw.number))
        except UserError as error:
            return LeftOut(draw.number, where, str(error), bad=True)
