"""Inspect rows in the workers of a DataLoader: parse, encode, decode every image, list every problem."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from flamingo_ft.data import Sample, Source, open_medium
from flamingo_ft.data.box_writer import BoxWriter
from flamingo_ft.data.boxes import cut_boxes
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.sample import Medium, Video, with_widest_boxes
from flamingo_ft.data.sample_order import WeightedSource
from flamingo_ft.data.sources.source import RawRow
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoImageProcessor
from flamingo_ft.model.geometry import Size
from flamingo_ft.model.images import conversions

from .text_checks import InspectedText, TextInspector, texts_of

ROWS_PER_BATCH = 16
CACHED_FILES = 4096  # image files whose digest is remembered
FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]*): ")  # at the start of an error: the field it is about


@dataclass(frozen=True)
class Row:
    """A row to inspect.

    Attributes:
        source: index of its source.
        number: its number in the source.
        raw: the row itself if it is streamed; otherwise it is read by number.
        failure: for a stream that broke off: the error, in place of the remaining rows.
    """

    source: int
    number: int
    raw: RawRow | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. row: 0-based number in the file; None if the whole file is unusable."""

    file: str
    row: int | None
    field: str | None
    problem: str


@dataclass(frozen=True)
class RowResult:
    """The result of inspecting a row.

    Counts are zero for rows with problems and for rows that data.too_long drops. They cover what trains: for
    a truncated sample what is left of it, for a preference pair the longer of its two texts.

    Attributes:
        source, file, row: index of the source, index of the file in it, row number in that file.
        label_tokens: text tokens in the loss.
        dropped: left out by data.too_long.
        losses, answers: see `InspectedText`.
        rewritten: the chat template does not reproduce an answer verbatim.
        digest: of the whole sample; prompt: of its images and all but the answers; media_digests: of the
            pixels of each image and video.
        media_sizes: width and height of each image and video.
        unread: text columns and message keys that the schema ignores.
        views: images that the tower encodes for the images and videos.
        conversions: images and videos by the conversion that the image reader applied (`images.CONVERSIONS`).
        boxes: of which the model sees ``cut_boxes`` only in part.
    """

    source: int
    file: int = 0
    row: int = 0
    problems: list[Problem] = field(default_factory=list)
    turns: int = 0
    images: int = 0
    videos: int = 0
    views: int = 0
    text_tokens: int = 0
    label_tokens: int = 0
    dropped: bool = False
    losses: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: tuple[int, ...] = ()
    rewritten: bool = False
    digest: int = 0
    prompt: int = 0
    media_digests: list[int] = field(default_factory=list)
    media_sizes: list[Size] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    conversions: dict[str, int] = field(default_factory=dict)
    boxes: int = 0
    cut_boxes: int = 0


class RowInspector(Dataset):
    """Map a `Row` to its `RowResult`, with all problems of the row and not just the first.

    text_inspectors: one for each source.
    """

    def __init__(self, sources: Sequence[Source], text_inspectors: Sequence[TextInspector]):
        self.sources, self.text_inspectors = sources, text_inspectors
        images = text_inspectors[0].processor.image_processor
        self.decoder, self.write_boxes = MediaDecoder(images), BoxWriter(images)

    def __getitem__(self, index: Row) -> RowResult:
        row = index  # `Dataset` calls it index
        source = self.sources[row.source]
        if row.failure is not None:
            return RowResult(row.source, problems=[_parse_problem(source.name, None, row.failure)])
        try:
            raw = source.raw(row.number) if row.raw is None else row.raw
        except UserError as error:
            return RowResult(row.source, problems=[_parse_problem(source.name, row.number, str(error))])
        try:
            sample = source.sample(row.number, raw)
        except UserError as error:
            problem = _row_problem(source.where(raw), raw.row, str(error))
            return RowResult(row.source, raw.file, raw.row, [problem])
        return self._inspect(row.source, raw, sample)

    def _inspect(self, source: int, raw: RawRow, sample: Sample) -> RowResult:
        media, problems = self._decode_media(sample, raw)
        try:
            sample = with_widest_boxes(sample) if problems else self.write_boxes(sample)
        except UserError as error:
            problems.append(_row_problem(sample.where, raw.row, str(error)))
            sample = with_widest_boxes(sample)
        text = self.text_inspectors[source](sample)
        if text.problem is not None:
            problems.insert(0, _row_problem(sample.where, raw.row, text.problem))
        if problems or text.encoded is None:
            return RowResult(
                source,
                raw.file,
                raw.row,
                problems,
                dropped=not problems,
                losses=text.losses,
                answers=text.answers,
                unread=sample.unread,
            )
        return _usable_row(source, raw, sample, text, media)

    def _decode_media(self, sample: Sample, raw: RawRow) -> tuple[list[DecodedMedium], list[Problem]]:
        """Decode every image and video; return them, and a problem for each that is unreadable."""
        decoded, problems = [], []
        for number, medium in enumerate(sample.images, start=1):
            try:
                decoded.append(self.decoder.decode(medium))
            except UserError as error:
                kind = "video" if isinstance(medium, Video) else "image"
                name = f"{kind} {number} of {len(sample.images)}"
                problems.append(Problem(file_of(sample.where, raw.row), raw.row, name, str(error)))
        return decoded, problems


def _usable_row(
    source: int, raw: RawRow, sample: Sample, text: InspectedText, media: list[DecodedMedium]
) -> RowResult:
    """The result for a sample without problems; truncation may leave only its first images."""
    assert text.encoded is not None
    kept = sample.images[: text.encoded.images]
    kept_media = media[: len(kept)]
    pixels = [medium.digest for medium in media]
    longest = max(texts_of(text.encoded), key=lambda one: one.text_tokens)
    videos = sum(isinstance(medium, Video) for medium in kept)
    return RowResult(
        source,
        raw.file,
        raw.row,
        turns=sum(message["role"] != "system" for message in sample.messages),
        images=len(kept) - videos,
        videos=videos,
        views=sum(medium.views for medium in kept_media),
        text_tokens=longest.text_tokens,
        label_tokens=sum(label != IGNORED for label in longest.labels),
        losses=text.losses,
        answers=text.answers,
        rewritten=text.encoded.rewritten,
        digest=sample_digest(sample, pixels),
        prompt=prompt_digest(sample, pixels),
        media_digests=[medium.digest for medium in kept_media],
        media_sizes=[medium.size for medium in kept_media],
        unread=sample.unread,
        conversions=dict(Counter(name for medium in kept_media for name in medium.conversions)),
        boxes=len(sample.boxes),
        cut_boxes=cut_boxes(sample),
    )


def inspect_rows(
    sources: Sequence[WeightedSource], inspector: RowInspector, workers: int
) -> Iterable[RowResult]:
    """Inspect all rows of all sources, in order for any number of workers, in constant memory."""
    rows = (row for index, source in enumerate(sources) for row in rows_of(index, source))
    batches = iter(lambda: list(islice(rows, ROWS_PER_BATCH)), [])
    loader = DataLoader(
        inspector,
        batch_sampler=batches,  # pyrefly: ignore[bad-argument-type]  (any iterable of batches, `Row`s as indices)
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own, so that loading does not advance torch's global generator
    )
    return (result for batch in loader for result in batch)


def rows_of(index: int, source: WeightedSource) -> Iterator[Row]:
    """Yield the rows of the source at ``index``; if a stream breaks off, its error instead of the rest."""
    if source.source.indexed:
        numbers = range(len(source.source)) if source.rows is None else source.rows.tolist()
        for number in numbers:
            yield Row(index, number)
        return
    try:
        for number, raw in enumerate(source.source.stream()):
            yield Row(index, number, raw)
    except UserError as error:
        yield Row(index, -1, failure=str(error))


# --- problems ---


def _row_problem(where: str, row: int, error: str) -> Problem:
    """Turn the error of a row into a `Problem`; ``where`` ("FILE: row N") may precede the error."""
    return _parse_problem(file_of(where, row), row, error.removeprefix(f"{where}: "))


def _parse_problem(file: str, row: int | None, error: str) -> Problem:
    """Split "FIELD: MESSAGE", without the file in front."""
    error = error.removeprefix(f"{file}: ")
    match = FIELD.match(error)
    return Problem(file, row, match[1] if match else None, error[match.end() :] if match else error)


def file_of(where: str, row: int) -> str:
    """Return FILE of "FILE: row N"."""
    return where.removesuffix(f": row {row}")


# --- digests: 64 bits; two of a million different ones collide with a probability of 3e-8 ---


@dataclass(frozen=True)
class DecodedMedium:
    """An image or video that was read.

    digest: of its pixels. size: width and height. conversions: those that the reader applied to any frame.
    views: images that the tower encodes for it: frames, or tiles and the whole image.
    """

    digest: int
    size: Size
    conversions: tuple[str, ...]
    views: int


class MediaDecoder:
    """Decode images and videos, and cache the outcome of recent files: rows of a data set often share one."""

    def __init__(self, images: FlamingoImageProcessor):
        self.images = images
        self._cache: dict[str, DecodedMedium | UserError] = {}

    def decode(self, medium: Medium) -> DecodedMedium:
        """Decode ``medium``. Raises UserError if it cannot be read."""
        if not isinstance(medium, str):
            return self._decode(medium)
        outcome = self._cache.get(medium)
        if outcome is None:
            try:
                outcome = self._decode(medium)
            except UserError as error:
                outcome = UserError(str(error))  # without the traceback, which would keep the image alive
            if len(self._cache) >= CACHED_FILES:
                self._cache.clear()
            self._cache[medium] = outcome
        if isinstance(outcome, UserError):
            raise UserError(str(outcome))
        return outcome

    def _decode(self, medium: Medium) -> DecodedMedium:
        frames = open_medium(medium, video_frames=self.images.video_frames)
        parts = (part for frame in frames for part in (str(frame.size).encode(), frame.tobytes()))
        applied = dict.fromkeys(name for frame in frames for name in conversions(frame))
        views = len(frames) if isinstance(medium, Video) else self.images.view_count(frames[0])
        return DecodedMedium(_digest(parts), frames[0].size, tuple(applied), views)


def sample_digest(sample: Sample, media_digests: Iterable[int]) -> int:
    """Return a digest of everything that is learned from: text, images and their positions."""
    return _text_digest([sample.messages, sample.rejected, [*media_digests], sample.label])


def prompt_digest(sample: Sample, media_digests: Iterable[int]) -> int:
    """Return a digest of the images and of the messages that are not the assistant's."""
    asked = [message for message in sample.messages if message["role"] != "assistant"]
    return _text_digest([asked, [*media_digests]])


def _text_digest(parts: list[Any]) -> int:
    text = json.dumps(parts, sort_keys=True)
    return _digest([text.encode("utf-8", "surrogatepass")])


def _digest(parts: Iterable[bytes]) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return int.from_bytes(state.digest(), "little")
