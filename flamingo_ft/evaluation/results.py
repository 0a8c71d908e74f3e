"""What evaluations of one run found: the answers themselves, and their accuracy as `metrics.json` has it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.atomic import file_in_place
from flamingo_ft.data.encode import readable
from flamingo_ft.data.preview import preview

from .accuracy import accuracy, accuracy_by_task
from .questions import Question

BEFORE, AFTER = "before", "after"
PREDICTIONS_FILE = "predictions.jsonl"


@dataclass
class Results:
    """Answers to the same questions: ``before`` and ``after`` training, and with ``shuffled_images``."""

    questions: Sequence[Question]
    answers: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The ``eval`` part of ``metrics.json``: accuracies in 0..1, overall and per task."""
        others = {name: answers for name, answers in self.answers.items() if name != AFTER}
        overall = {"accuracy": accuracy(self.questions, self.answers[AFTER])}
        overall |= {f"accuracy_{name}": accuracy(self.questions, answers) for name, answers in others.items()}
        counts = Counter(question.task for question in self.questions)
        per_task = {
            task: {"accuracy": share, "samples": counts[task]}
            for task, share in accuracy_by_task(self.questions, self.answers[AFTER]).items()
        }
        for name, answers in others.items():
            for task, share in accuracy_by_task(self.questions, answers).items():
                per_task[task][name] = share
        return {**overall, "per_task": per_task}

    def save(self, folder: Path) -> None:
        """Every question, ``<image>`` where an image stands, with its right answer and what the model said each time."""
        with file_in_place(folder / PREDICTIONS_FILE) as place, place.open("w", encoding="utf-8") as file:
            for index, question in enumerate(self.questions):
                said = {name: answers[index] for name, answers in self.answers.items()}
                file.write(json.dumps(_row(question) | said, ensure_ascii=False) + "\n")

    def recall(self, name: str, folder: Path) -> None:
        """Take the answers of one time from what `save` wrote, where it is there and has these questions."""
        rows = load_predictions(folder) if (folder / PREDICTIONS_FILE).is_file() else []
        same = [row["where"] for row in rows] == [question.where for question in self.questions]
        if same and all(name in row for row in rows):
            self.answers[name] = [row[name] for row in rows]


def load_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows that `Results.save` wrote."""
    with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _row(question: Question) -> dict[str, Any]:
    return {
        "where": question.where,
        "task": question.task,
        "images": [preview(medium) for medium in question.images],
        "question": readable(question.messages[-1]).strip(),
        "answer": question.answer,
    }
