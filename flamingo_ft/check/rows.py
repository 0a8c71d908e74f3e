"""From a row to all that is to be told of it; this is the work that worker processes do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from flamingo_ft.data import Sample, Source
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.sample import Video
from flamingo_ft.data.sources.source import RawRow
from flamingo_ft.data.stream.order import WeightedSource
from flamingo_ft.errors import UserError

from .digests import Picture, Pictures, sample_digest
from .encoding import Encoding, texts_of

ROWS_AT_A_TIME = 16
FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]*): ")


@dataclass(frozen=True)
class Row:
    """A row to look at: of which part of the data, its number there, and itself where it is streamed.

    failure: in place of the rest of a stream, what ended it.
    """

    part: int
    number: int
    raw: RawRow | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. row: its 0-based number in the file; None where the whole file is meant."""

    file: str
    row: int | None
    field: str | None
    problem: str


@dataclass(frozen=True)
class Seen:
    """What became of a row. file, row: where it stands.

    Without problems: its turns, and of what trains its images, videos and tokens, of a pair those of its longer text.
    dropped: by the recipe. losses, answers: see `Text`. rewritten: an answer is not written in full. content: digest of
    the sample. pictures: digests of its images and videos. unread: see `Sample`. conversions: of how many of them the
    reader changed what, by the names of `images.CONVERSIONS`.
    """

    part: int
    file: int = 0
    row: int = 0
    problems: list[Problem] = field(default_factory=list)
    turns: int = 0
    images: int = 0
    videos: int = 0
    text_tokens: int = 0
    label_tokens: int = 0
    dropped: bool = False
    losses: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: tuple[int, ...] = ()
    rewritten: bool = False
    content: int = 0
    pictures: list[int] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    conversions: dict[str, int] = field(default_factory=dict)


class Looking(Dataset):
    """From `Row` to `Seen`: parsed, encoded, every image decoded. Tells every problem of a row, not the first alone."""

    def __init__(self, sources: Sequence[Source], encoding: Encoding, video_frames: int):
        self.sources, self.encoding = sources, encoding
        self.pictures = Pictures(video_frames)

    def __getitem__(self, row: Row) -> Seen:
        source = self.sources[row.part]
        if row.failure is not None:
            return Seen(row.part, problems=[problem_of(source.name, None, row.failure)])
        try:
            raw = source.raw(row.number) if row.raw is None else row.raw
        except UserError as error:
            return Seen(row.part, problems=[problem_of(source.name, row.number, str(error))])
        try:
            sample = source.sample(row.number, raw)
        except UserError as error:
            return Seen(row.part, raw.file, raw.row, [problem_at(source.where(raw), raw.row, str(error))])
        return self._seen(row.part, raw, sample)

    def _seen(self, part: int, raw: RawRow, sample: Sample) -> Seen:
        text, problems = self.encoding(sample), []
        if text.problem is not None:
            problems.append(problem_at(sample.where, raw.row, text.problem))
        pictures = list(self._pictures(sample, raw, problems))
        if problems or text.encoded is None:
            own = {"losses": text.losses, "answers": text.answers, "unread": sample.unread}
            return Seen(part, raw.file, raw.row, problems, dropped=not problems, **own)
        kept = sample.images[: text.encoded.images]
        longest = max(texts_of(text.encoded), key=lambda one: one.text_tokens)
        videos = sum(isinstance(medium, Video) for medium in kept)
        return Seen(
            part,
            raw.file,
            raw.row,
            turns=sum(message["role"] != "system" for message in sample.messages),
            images=len(kept) - videos,
            videos=videos,
            text_tokens=longest.text_tokens,
            label_tokens=sum(label != IGNORED for label in longest.labels),
            losses=text.losses,
            rewritten=text.encoded.rewritten,
            answers=text.answers,
            unread=sample.unread,
            content=sample_digest(sample, [picture.digest for picture in pictures]),
            pictures=[picture.digest for picture in pictures[: len(kept)]],
            conversions=dict(
                Counter(name for picture in pictures[: len(kept)] for name in picture.conversions)
            ),
        )

    def _pictures(self, sample: Sample, raw: RawRow, problems: list[Problem]) -> Iterator[Picture]:
        for number, medium in enumerate(sample.images, start=1):
            try:
                yield self.pictures.look_at(medium)
            except UserError as error:
                name = f"{'video' if isinstance(medium, Video) else 'image'} {number} of {len(sample.images)}"
                problems.append(Problem(file_of(sample.where, raw.row), raw.row, name, str(error)))


def look(mixture: Sequence[WeightedSource], looking: Looking, workers: int) -> Iterable[Seen]:
    """All rows of all sources, in order whatever the number of workers, in constant memory."""
    rows = (row for part, mixed in enumerate(mixture) for row in rows_of(part, mixed))
    batches = iter(lambda: list(islice(rows, ROWS_AT_A_TIME)), [])
    # A generator of its own, so that loading leaves torch's random numbers alone.
    loader = DataLoader(
        looking, batch_sampler=batches, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    return (seen for batch in loader for seen in batch)


def rows_of(part: int, mixed: WeightedSource) -> Iterator[Row]:
    """The rows of one source; where a stream breaks off, the reason in place of the rest."""
    source = mixed.source
    if source.indexed:
        yield from (
            Row(part, number)
            for number in (range(len(source)) if mixed.rows is None else mixed.rows.tolist())
        )
        return
    try:
        yield from (Row(part, number, raw) for number, raw in enumerate(source.stream()))
    except UserError as error:
        yield Row(part, -1, failure=str(error))


def problem_at(where: str, row: int, error: str) -> Problem:
    """The problem that an error, beginning with ``where`` or not, tells of a row."""
    return problem_of(file_of(where, row), row, error.removeprefix(f"{where}: "))


def problem_of(file: str, row: int | None, error: str) -> Problem:
    error = error.removeprefix(f"{file}: ")
    found = FIELD.match(error)
    return Problem(file, row, found[1] if found else None, error[found.end() :] if found else error)


def file_of(where: str, row: int) -> str:
    return where.removesuffix(f": row {row}")
