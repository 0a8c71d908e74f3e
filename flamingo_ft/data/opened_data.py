"""A recipe's data, opened: which rows of which source are trained on, and which are evaluated on."""

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
from .sample import Image, Medium, Sample, Video
from .sources import open_source
from .stream.order import WeightedSource

MAX_VALIDATED_ROWS = 50_000  # takes some seconds


@dataclass(frozen=True)
class OpenedData:
    """The sources of a recipe: ``train``, with weights, and ``eval``, never trained on.

    skipped: why evaluation rows cannot be used, by "FILE: row N".
    """

    section: DataSection
    train: list[WeightedSource]
    eval: list[WeightedSource]
    skipped: dict[str, str] = field(default_factory=dict)

    def samples(self, mixture: Sequence[WeightedSource]) -> Iterator[Sample]:
        """Yield the samples of some of the sources in the order of their rows.

        A bad row raises or is skipped, as ``data.on_bad_sample`` says.
        """
        return itertools.chain.from_iterable(_samples(weighted, self.section) for weighted in mixture)

    def validate_rows(self) -> None:
        """Read all rows of training sources of up to `MAX_VALIDATED_ROWS`, so that bad rows do not end a run
        later.

        Raises UserError for the first bad one, unless they are skipped. Images are not opened.
        """
        if self.section.on_bad_sample == "skip":
            return
        for weighted in self.train:
            if weighted.source.indexed and weighted.size <= MAX_VALIDATED_ROWS:
                for _ in _samples(weighted, self.section):
                    pass

    def eval_samples(self, max_per_source: int | None = None) -> list[Sample]:
        """Return the first evaluation samples of each source, their images opened: evaluation must not
        fail later."""
        read = partial(_samples, section=self.section, check_images=True, skipped=self.skipped)
        return [
            sample for weighted in self.eval for sample in itertools.islice(read(weighted), max_per_source)
        ]


def open_data(section: DataSection, seed: int) -> OpenedData:
    """Open the sources of a recipe's ``data`` and split off ``eval_fraction``; the seed decides which rows.

    Raises UserError for a source that cannot be opened, or of which nothing can be held out.
    """
    train = [WeightedSource(open_source(entry, section), entry.weight) for entry in section.train]
    evaluated = [WeightedSource(open_source(entry, section)) for entry in section.eval]
    if section.eval_fraction:
        splits = split_eval([weighted.source for weighted in train], section.eval_fraction, seed)
        whole, train = train, []
        for weighted, (train_rows, eval_rows) in zip(whole, splits, strict=True):
            train.append(replace(weighted, rows=train_rows))
            evaluated.append(WeightedSource(weighted.source, rows=eval_rows))
    return OpenedData(section, train, evaluated)


def _samples(
    weighted: WeightedSource,
    section: DataSection,
    check_images: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a source.

    Args:
        check_images: treat a sample whose images cannot be read as bad.
        skipped: receives why rows are skipped, by "FILE: row N".
    """
    source = weighted.source
    if weighted.rows is None:
        rows = enumerate(source.stream())
    else:
        rows = ((row, source.raw(row)) for row in weighted.rows.tolist())
    for row, raw in rows:
        try:
            sample = source.sample(row, raw)
            if check_images:
                sample = _with_opened_images(sample, section.video_frames)
        except UserError as error:
            if section.on_bad_sample == "error":
                raise
            if skipped is not None:
                skipped[source.where(raw)] = str(error)
            continue
        yield sample


def _with_opened_images(sample: Sample, video_frames: int) -> Sample:
    """Return the sample after opening its images once; those at URLs are kept, since they may be gone later.

    Raises UserError for one that cannot be read.
    """
    images = []
    for medium in sample.images:
        images.append(_downloaded(medium, sample.where))
        is_remote = isinstance(medium, str) and is_url(medium)
        open_medium(images[-1], f"{sample.where}: {medium}" if is_remote else sample.where, video_frames)
    return replace(sample, images=images)


def _downloaded(medium: Medium, where: str) -> Medium:
    """Return the medium with the content of URLs in their place."""
    if not isinstance(medium, Video):
        return _downloaded_image(medium, where)
    file = None if medium.file is None else _downloaded_image(medium.file, where)
    return Video(tuple(_downloaded_image(frame, where) for frame in medium.frames), file)


def _downloaded_image(image: Image, where: str) -> Image:
    return read_bytes(image, where) if isinstance(image, str) and is_url(image) else image
