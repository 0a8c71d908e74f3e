"""The first samples as they will train: their pictures, and their tokens with or without loss."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image as PillowImage

from flamingo_ft.data import open_medium
from flamingo_ft.data.sample import Medium, Video
from flamingo_ft.data.stream.order import Mixed
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import data_uri

from .encoding import Encoding, texts_of
from .rows import Row, rows_of
from .tokens import Token, shown_tokens

SHOWN = 4  # samples of each source
MOST_TOKENS, MOST_PICTURES = 600, 12  # of a sample
SIDE, EXACT = 160, 64  # pixels
TRIED = 200  # rows, in search of usable ones


@dataclass(frozen=True)
class Picture:
    """uris: small pictures as data: URIs, several of a video. exact: with every pixel of the image itself."""

    uris: list[str]
    video: bool
    exact: bool


@dataclass(frozen=True)
class Shown:
    """A sample to look at, of a pair both texts, one after the other. more_tokens, more_pictures: how many are not shown."""

    where: str
    task: str
    tokens: list[Token]
    pictures: list[Picture]
    text_tokens: int
    label_tokens: int
    more_tokens: int
    more_pictures: int


def first_samples(part: int, mixed: Mixed, encoding: Encoding, video_frames: int) -> list[Shown]:
    """The first usable samples of a source."""
    shown: list[Shown] = []
    for row, _ in zip(rows_of(part, mixed), range(TRIED), strict=False):
        shown += _shown(mixed, row, encoding, video_frames)
        if len(shown) == SHOWN:
            break
    return shown


def _shown(mixed: Mixed, row: Row, encoding: Encoding, video_frames: int) -> Iterator[Shown]:
    """The sample of a row, if it can be used."""
    if row.failure is not None:
        return
    source = mixed.source
    try:
        raw = source.raw(row.number) if row.raw is None else row.raw
        sample = source.sample(row.number, raw)
        encoded = encoding(sample).encoded
        if encoded is None:
            return
        pictures = [_picture(medium, video_frames) for medium in sample.images[: encoded.images]]
    except UserError:
        return
    texts = texts_of(encoded)
    tokens = [
        token for text in texts for token in shown_tokens(encoding.processor, text.input_ids, text.labels)
    ]
    yield Shown(
        sample.where,
        sample.task,
        tokens[:MOST_TOKENS],
        pictures[:MOST_PICTURES],
        len(tokens),
        sum(token.learned for token in tokens),
        max(0, len(tokens) - MOST_TOKENS),
        max(0, len(pictures) - MOST_PICTURES),
    )


def _picture(medium: Medium, video_frames: int) -> Picture:
    frames = open_medium(medium, video_frames=video_frames)
    exact = max(frames[0].size) <= EXACT
    return Picture([_uri(frame) for frame in frames], isinstance(medium, Video), exact)


def _uri(image: PillowImage.Image) -> str:
    """Small pictures exactly, larger ones as small JPEGs."""
    form = "PNG" if max(image.size) <= EXACT else "JPEG"
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return data_uri(buffer.getvalue(), f"image/{form.lower()}")
