"""What an evaluation task is: how its published files are read, and how a model is asked and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

from .folder import DataFolder

BEAMS = {"num_beams": 3, "length_penalty": 0.0}  # OpenFlamingo's evaluation of captions and answers
SHORT_ANSWER = {**BEAMS, "max_new_tokens": 5}
SHORT_ANSWER_REQUEST = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5's


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    where: file and row, for error messages. images: paths. question: what is asked; empty for captions.
    references: all right answers, the one that a demonstration gives first. labels: the answers to rank, of
    a task that ranks them. category: group that is scored separately as well. group: image or other unit
    whose examples belong together, where the publisher scores such units.
    """

    where: str
    images: tuple[str, ...]
    question: str
    references: tuple[str, ...]
    labels: tuple[str, ...] = ()
    category: str = ""
    group: str = ""


FurtherScores = Callable[[Sequence[Example], Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """An evaluation set.

    name: what ``flamingo-ft eval`` calls it. title: its published name. source: URL of the publisher's
        description of the files. files: what the folder of its files must contain, for people to read.
    read: (folder, split) -> examples of a split, under the publisher's name for it.
    eval_split, train_split: the splits to evaluate on and to draw demonstrations from; None: it has no
        training rows.
    chunk: the text of a chunk after its images, up to the answer, with ``{question}`` for the question.
    chat: the same for a chat model, as the text of a user message.
    metrics: names of the metrics. ranks_labels: whether the examples' labels are ranked by their
        log-likelihood per token, the answer's end left out, instead of an answer being generated.
    cut: generated text -> the answer that is scored.
    decoding: options of `Predictor.answer`.
    separator: text between the end of a chunk and the next one.
    further_scores: (examples, their cut answers) -> the publisher's figures that are not means over
        examples, by name.
    """

    name: str
    title: str
    source: str
    files: tuple[str, ...]
    read: Callable[[DataFolder, str], list[Example]]
    eval_split: str
    train_split: str | None
    chunk: str
    chat: str
    metrics: tuple[str, ...]
    ranks_labels: bool = False
    cut: Callable[[str], str] = str.strip
    decoding: Mapping[str, Any] = field(default_factory=lambda: SHORT_ANSWER)
    separator: str = "\n"
    further_scores: FurtherScores | None = None

    def open(self, path: str | Path) -> DataFolder:
        """Open the folder of the task's files. Raises UserError if there is no such folder."""
        return DataFolder(path, self.source)

    def eval_examples(self, folder: DataFolder) -> list[Example]:
        """Return the examples to evaluate on.

        Raises UserError for a missing or ambiguous file, and for a row that is not in the published format.
        """
        return self._examples(folder, self.eval_split)

    def train_examples(self, folder: DataFolder) -> list[Example]:
        """Return the examples to draw demonstrations from.

        Raises UserError if the task has none, and as `eval_examples` does.
        """
        if self.train_split is None:
            raise UserError(
                f"{self.name}: has no training rows to draw demonstrations from; evaluate it without any"
            )
        return self._examples(folder, self.train_split)

    def _examples(self, folder: DataFolder, split: str) -> list[Example]:
        examples = self.read(folder, split)
        if not examples:
            raise UserError(f"{folder.root}: no rows of split {split}; compare with {self.source}")
        return examples
