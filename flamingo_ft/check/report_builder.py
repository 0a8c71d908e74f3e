"""Summarise inspected rows: totals per source, distributions, duplicates and the log of problems."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flamingo_ft.config import EvalSection
from flamingo_ft.data import OpenedData
from flamingo_ft.data.sources.source import RawRow
from flamingo_ft.evaluation.questions import AnswerLengths
from flamingo_ft.model import FlamingoImageProcessor

from .check_report import (
    EVAL,
    TRAIN,
    CheckReport,
    Distribution,
    DuplicateGroup,
    DuplicateStats,
    LongSampleStats,
    SourceStats,
    TrainingLength,
)
from .image_sizes import ImageSizes
from .row_inspector import Problem, RowResult, file_of
from .text_checks import DialogueFormat

FIRST_PROBLEMS = 20  # printed on the terminal; problems.jsonl has all
GROUPS, GROUP_ROWS = 20, 5  # most duplicate groups listed, and most rows listed of each


class ReportBuilder:
    """Collect `RowResult`s in order and build the `CheckReport` from them."""

    def __init__(
        self,
        data: OpenedData,
        evaluation: EvalSection,
        limit: int,
        problems: ProblemLog,
        images: FlamingoImageProcessor,
    ):
        self.config = data.section
        self.problems = problems
        self._answers = AnswerLengths(evaluation.max_new_tokens)
        self._max_eval_samples = evaluation.max_samples
        self._eval_samples: Counter[int] = Counter()  # by source
        self._sources = [weighted.source for weighted in (*data.train, *data.eval)]
        self._train_sources = len(data.train)
        self._stats = [
            SourceStats(source.name, TRAIN if index < self._train_sources else EVAL, source.format)
            for index, source in enumerate(self._sources)
        ]
        self._long_samples = LongSampleStats(limit, data.section.too_long)
        self._rows = RowTable()
        self._images = images

    def add(self, result: RowResult) -> None:
        self._stats[result.source].add(result)
        self.problems.add(result.problems)
        if result.source < self._train_sources:
            self._long_samples.add(result.losses)
        elif not result.problems:
            self._add_answers(result)
        if not (result.problems or result.dropped):
            self._rows.add(result)

    def _add_answers(self, result: RowResult) -> None:
        """Measure the answers that evaluation uses, of the first ``eval.max_samples`` of each source."""
        if self._max_eval_samples is None or self._eval_samples[result.source] < self._max_eval_samples:
            self._eval_samples[result.source] += 1
            self._answers.add(result.answers)

    def build(
        self, recipe: str, lengths: dict[str, TrainingLength], text_form: DialogueFormat | None
    ) -> CheckReport:
        return CheckReport(
            recipe=recipe,
            on_bad_sample=self.config.on_bad_sample,
            max_bad_share=self.config.max_bad_share,
            parts=self._stats,
            distributions=self._distributions(),
            too_long=self._long_samples,
            repeats=self._duplicate_stats(),
            problems=self.problems.count,
            first_problems=self.problems.first,
            answers=self._answers,
            lengths=lengths,
            image_sizes=self._image_sizes(),
            text_form=text_form,
        )

    def _image_sizes(self) -> ImageSizes | None:
        """Median sizes of the training images and videos."""
        rows = self._rows.column("medium_row")
        if not len(rows):
            return None
        is_train = self._rows.column("source")[rows] < self._train_sources
        if not is_train.any():
            return None
        sizes = (self._rows.column(name)[is_train] for name in ("medium_width", "medium_height"))
        width, height = (int(np.median(size)) for size in sizes)
        input_height, input_width = self._images.input_size
        return ImageSizes(width, height, input_width, input_height, self._images.tiling is not None)

    def _distributions(self) -> dict[str, Distribution]:
        """Distributions over the training samples."""
        is_train = self._rows.column("source") < self._train_sources
        names = ("text_tokens", "label_tokens", "turns", "media", "views")
        tokens, labels, turns, media, views = (self._rows.column(name)[is_train] for name in names)
        return {
            "turns": Distribution.of(turns),
            "images": Distribution.of(media),
            "views": Distribution.of(views),
            "text_tokens": Distribution.of(tokens),
            "label_tokens": Distribution.of(labels),
            "loss_share": Distribution.of(labels / np.maximum(tokens, 1), integers=False, high=1),
        }

    def _duplicate_stats(self) -> DuplicateStats:
        duplicates = find_duplicates(self._rows, self._train_sources)
        return DuplicateStats(
            copies=duplicates.copies,
            copy_groups=self._named(duplicates.copy_groups),
            leaked=duplicates.leaked,
            leaked_groups=self._named(duplicates.leaked_groups),
            images=duplicates.media,
            repeated_images=duplicates.repeated_media,
            images_asked_again=duplicates.asked_again,
            repeated_groups=self._named(duplicates.repeated_groups),
            leaked_images=duplicates.leaked_media,
        )

    def _named(self, groups: Iterable[RowGroup]) -> list[DuplicateGroup]:
        """Replace the row indices of groups by file names and row numbers, as error messages have them."""
        return [DuplicateGroup(group.size, self._rows_by_file(group.rows)) for group in groups]

    def _rows_by_file(self, indices: Iterable[int]) -> dict[str, list[int]]:
        source, file, row = (self._rows.column(name) for name in ("source", "file", "row"))
        by_file: dict[str, list[int]] = {}
        for i in indices:
            raw = RawRow(int(file[i]), int(row[i]), None)
            name = file_of(self._sources[source[i]].where(raw), raw.row)
            by_file.setdefault(name, []).append(raw.row)
        return by_file


class ProblemLog:
    """All problems, in a JSONL file and not in memory: a million bad rows must fit.

    Iterating reads the file; ``first`` holds the first `FIRST_PROBLEMS` of them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.first: list[Problem] = []
        self.count = 0
        path.write_text("", encoding="utf-8")

    def add(self, problems: list[Problem]) -> None:
        if not problems:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(problem)) + "\n" for problem in problems)
        self.first += problems[: FIRST_PROBLEMS - len(self.first)]
        self.count += len(problems)

    def __iter__(self) -> Iterator[Problem]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield Problem(**json.loads(line))


class RowTable:
    """Columns of numbers over the usable rows, in order: about 72 bytes per row and 20 per image or video.

    ``medium`` (digest), ``medium_row`` (index of its row), ``medium_width`` and ``medium_height`` are columns
    over the images and videos of all rows.
    """

    def __init__(self) -> None:
        self._columns = {
            "source": array("i"),
            "file": array("i"),
            "row": array("q"),
            "turns": array("i"),
            "media": array("i"),
            "views": array("i"),
            "text_tokens": array("q"),
            "label_tokens": array("q"),
            "digest": array("Q"),
            "prompt": array("Q"),
            "medium": array("Q"),
            "medium_row": array("i"),
            "medium_width": array("i"),
            "medium_height": array("i"),
        }

    def add(self, result: RowResult) -> None:
        columns = self._columns
        index = len(columns["source"])
        for name in columns.keys() - {"media", "medium", "medium_row", "medium_width", "medium_height"}:
            columns[name].append(getattr(result, name))
        columns["media"].append(len(result.media_digests))
        columns["medium"].extend(result.media_digests)
        columns["medium_row"].extend([index] * len(result.media_digests))
        columns["medium_width"].extend(width for width, _ in result.media_sizes)
        columns["medium_height"].extend(height for _, height in result.media_sizes)

    def column(self, name: str) -> np.ndarray:
        column = self._columns[name]
        return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, column.typecode)


@dataclass(frozen=True)
class RowGroup:
    """``size`` rows that share a digest, and the indices of the first few of them in `RowTable`."""

    rows: list[int]
    size: int


@dataclass(frozen=True)
class Duplicates:
    """What occurs more than once.

    Attributes:
        copies: training samples that equal an earlier one.
        leaked: held-out samples that equal a training sample.
        media: distinct images and videos.
        repeated_media: distinct images and videos that occur more than once.
        asked_again: those of them in several samples with the same images and prompt.
        leaked_media: held-out samples that share an image or video with a training sample.
    """

    copies: int
    copy_groups: list[RowGroup]
    leaked: int
    leaked_groups: list[RowGroup]
    media: int
    repeated_media: int
    asked_again: int
    repeated_groups: list[RowGroup]
    leaked_media: int


def find_duplicates(rows: RowTable, train_sources: int) -> Duplicates:
    """Find duplicates among all usable rows; sources from index ``train_sources`` on are evaluation data."""
    digests, is_eval = rows.column("digest"), rows.column("source") >= train_sources
    indices = np.arange(len(digests))
    train_digests = digests[~is_eval]
    leaked = is_eval & np.isin(digests, train_digests)
    media, medium_row = rows.column("medium"), rows.column("medium_row")
    medium_is_eval = is_eval[medium_row] if len(medium_row) else np.empty(0, bool)
    leaked_media = medium_is_eval & np.isin(media, media[~medium_is_eval])
    _, counts = np.unique(media, return_counts=True)
    _, prompt, times = np.unique(rows.column("prompt"), return_inverse=True, return_counts=True)
    is_asked_again = times[prompt] > 1
    return Duplicates(
        copies=len(train_digests) - len(np.unique(train_digests)),
        copy_groups=_largest_groups(train_digests, indices[~is_eval]),
        leaked=int(leaked.sum()),
        leaked_groups=_largest_groups(digests, indices, only=digests[leaked]),
        media=len(counts),
        repeated_media=int((counts > 1).sum()),
        asked_again=len(np.unique(media[is_asked_again[medium_row]])),
        repeated_groups=_largest_groups(media, medium_row),
        leaked_media=len(np.unique(medium_row[leaked_media])),
    )


def _largest_groups(keys: np.ndarray, rows: np.ndarray, only: np.ndarray | None = None) -> list[RowGroup]:
    """Return the largest groups of equal keys, ties in order of their first row.

    Groups of one are left out, unless ``only`` names the keys of the groups to return.
    """
    order = np.argsort(keys, kind="stable")
    distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    selected = np.flatnonzero(counts > 1 if only is None else np.isin(distinct, only))
    ranked = sorted(selected.tolist(), key=lambda group: (-counts[group], rows[order[starts[group]]]))
    groups = []
    for group in ranked[:GROUPS]:
        members = rows[order[starts[group] : starts[group] + counts[group]]]
        groups.append(RowGroup(members[:GROUP_ROWS].tolist(), int(counts[group])))
    return groups
