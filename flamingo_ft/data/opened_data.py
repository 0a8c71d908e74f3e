"""A recipe's data, opened: which rows of which source train, and which are held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from flamingo_ft.config import DataSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.download import is_url

from .eval_split import split_eval
from .media import open_medium, read_bytes
from .sample import Medium, Sample, Video
from .sources import open_source
from .stream.order import WeightedSource

MAX_VALIDATED_ROWS = 50_000  # rows; some seconds


@dataclass(frozen=True)
class OpenedData:
    """Sources of a recipe. ``train``: with weights; ``eval``: never trained on.

    skipped: where each held-out row is that was looked at and cannot be used, and why.
    """

    section: DataSection
    train: list[WeightedSource]
    eval: list[WeightedSource]
    skipped: dict[str, str] = field(default_factory=dict)

    def samples(self, mixture: Sequence[WeightedSource]) -> Iterator[Sample]:
        """The samples of some of the sources, one after the other, in the order of their rows; bad ones end it or are
        left out, as the recipe says."""
        return itertools.chain.from_iterable(_samples(mixed, self.section) for mixed in mixture)

    def validate_rows(self) -> None:
        """Read the rows of training sources that are soon read, so that a run that bad rows end is not begun.

        Raises UserError for the first bad one, where they are not skipped. Images are not opened.
        """
        if self.section.on_bad_sample == "skip":
            return
        for mixed in self.train:
            if mixed.source.indexed and mixed.size <= MAX_VALIDATED_ROWS:
                for _ in _samples(mixed, self.section):
                    pass

    def eval_samples(self, most_per_source: int | None = None) -> list[Sample]:
        """The first held-out samples of each source, their images looked at: evaluation must not fail after training."""
        read = partial(_samples, section=self.section, look=True, left_out=self.skipped)
        return [sample for mixed in self.eval for sample in itertools.islice(read(mixed), most_per_source)]


def open_data(section: DataSection, seed: int) -> OpenedData:
    """Open the sources of a recipe's ``data``, and hold out what it says; ``seed`` chooses which.

    Raises UserError for a source that cannot be opened or has nothing to hold out.
    """
    train = [WeightedSource(open_source(entry, section), entry.weight) for entry in section.train]
    held_out = [WeightedSource(open_source(entry, section)) for entry in section.eval]
    if section.eval_fraction:
        splits = split_eval([mixed.source for mixed in train], section.eval_fraction, seed)
        held_out += [
            WeightedSource(mixed.source, rows=rows) for mixed, (_, rows) in zip(train, splits, strict=True)
        ]
        train = [
            WeightedSource(mixed.source, mixed.weight, rows)
            for mixed, (rows, _) in zip(train, splits, strict=True)
        ]
    return OpenedData(section, train, held_out)


def _samples(
    mixed: WeightedSource, section: DataSection, look: bool = False, left_out: dict[str, str] | None = None
) -> Iterator[Sample]:
    """The samples of a source; look: only those whose images can be read. left_out: gets where others are, and why."""
    source = mixed.source
    rows = (
        enumerate(source.stream())
        if mixed.rows is None
        else ((row, source.raw(row)) for row in mixed.rows.tolist())
    )
    for row, raw in rows:
        try:
            sample = source.sample(row, raw)
            sample = _looked_at(sample, section.video_frames) if look else sample
        except UserError as error:
            if section.on_bad_sample == "error":
                raise
            if left_out is not None:
                left_out[source.where(raw)] = str(error)
            continue
        yield sample


def _looked_at(sample: Sample, video_frames: int) -> Sample:
    """The sample, its images opened once; those from the network are kept, which may be gone when they are asked for
    again. UserError for one that cannot be read."""
    images = []
    for medium in sample.images:
        images.append(_at_hand(medium, sample.where))
        fetched = isinstance(medium, str) and is_url(medium)
        open_medium(images[-1], f"{sample.where}: {medium}" if fetched else sample.where, video_frames)
    return replace(sample, images=images)


def _at_hand(medium: Medium, where: str) -> Medium:
    """The medium with the content of URLs in their place."""
    if not isinstance(medium, Video):
        return read_bytes(medium, where) if isinstance(medium, str) and is_url(medium) else medium
    file = None if medium.file is None else _at_hand(medium.file, where)
    return Video(tuple(_at_hand(frame, where) for frame in medium.frames), file)
