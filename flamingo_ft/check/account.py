"""What was seen, summed up row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from flamingo_ft.config import DataSection, EvalSection
from flamingo_ft.data import OpenedData
from flamingo_ft.data.sources.rows import RawRow
from flamingo_ft.evaluation.questions import AnswerLengths

from .duplicates import Group, find_duplicates
from .findings import Copies, Findings, Length, Part, Repeats, TooLong
from .numbers import Distribution, Numbers
from .problems import ProblemList
from .rows import Seen, file_of

TRAIN, HELD_OUT = "train", "held out"


class Account:
    """Takes in rows one by one, and tells in the end what they are together."""

    def __init__(self, data: OpenedData, evaluation: EvalSection, limit: int, problems: ProblemList):
        self.section: DataSection = data.section
        self.answers = AnswerLengths(evaluation.max_new_tokens)
        self._most_evaluated = evaluation.max_samples
        self._evaluated: Counter = Counter()
        self.sources = [mixed.source for mixed in (*data.train, *data.held_out)]
        self.trained = len(data.train)
        self.parts = [
            Part(source.name, TRAIN if index < self.trained else HELD_OUT, source.format)
            for index, source in enumerate(self.sources)
        ]
        self.too_long = TooLong(limit, data.section.too_long)
        self.numbers = Numbers()
        self.problems = problems

    def add(self, seen: Seen) -> None:
        self.parts[seen.part].add(seen)
        self.problems.add(seen.problems)
        if seen.part < self.trained:
            self.too_long.add(seen.losses)
        elif not seen.problems:
            self._add_answers(seen)
        if not (seen.problems or seen.dropped):
            self.numbers.add(seen)

    def _add_answers(self, seen: Seen) -> None:
        """Those that evaluation asks for: of the first usable samples of each held-out source."""
        if self._most_evaluated is None or self._evaluated[seen.part] < self._most_evaluated:
            self._evaluated[seen.part] += 1
            self.answers.add(seen.answers)

    def findings(self, recipe: str, length: Length) -> Findings:
        return Findings(
            recipe,
            self.section.on_bad_sample,
            self.section.max_bad_share,
            self.parts,
            self._distributions(),
            self.too_long,
            self._repeats(),
            self.problems.count,
            self.problems.first,
            self.answers,
            length,
        )

    def _distributions(self) -> dict[str, Distribution]:
        """Over the training samples."""
        numbers, trains = self.numbers, self.numbers.column("part") < self.trained
        tokens, learned = numbers.column("text_tokens")[trains], numbers.column("label_tokens")[trains]
        return {
            "turns": Distribution.of(numbers.column("turns")[trains]),
            "images": Distribution.of(numbers.column("media")[trains]),
            "text_tokens": Distribution.of(tokens),
            "label_tokens": Distribution.of(learned),
            "loss_share": Distribution.of(learned / np.maximum(tokens, 1), whole=False, most=1),
        }

    def _repeats(self) -> Repeats:
        found = find_duplicates(self.numbers, self.trained)
        return Repeats(
            found.copies,
            self._named(found.groups),
            found.leaked,
            self._named(found.leaked_groups),
            found.pictures,
            found.repeated,
            self._named(found.repeated_groups),
            found.leaked_pictures,
        )

    def _named(self, groups: Iterable[Group]) -> list[Copies]:
        """The groups with their rows as errors name them."""
        return [Copies(group.times, self._rows(group.rows)) for group in groups]

    def _rows(self, numbers: Iterable[int]) -> dict[str, list[int]]:
        """Rows by file."""
        part, file, row = (self.numbers.column(name) for name in ("part", "file", "row"))
        by_file: dict[str, list[int]] = {}
        for i in numbers:
            raw = RawRow(int(file[i]), int(row[i]), None)
            name = file_of(self.sources[part[i]].where(raw), raw.row)
            by_file.setdefault(name, []).append(raw.row)
        return by_file
