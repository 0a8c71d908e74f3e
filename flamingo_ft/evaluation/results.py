"""What evaluations of one run found: the answers themselves, and their accuracy as `metrics.json` has it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.atomic import file_in_place
from flamingo_ft.data.media import preview
from flamingo_ft.data.sample import display_text

from .accuracy import accuracy
from .baselines import by_class, is_free_text, majority
from .questions import Question
from .verdict import verdict

BEFORE, AFTER, SHUFFLED = "before", "after", "shuffled_images"
PREDICTIONS_FILE = "predictions.jsonl"


@dataclass
class Results:
    """Answers to the same questions: ``before`` and ``after`` training, and with ``shuffled_images``."""

    questions: Sequence[Question]
    answers: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The ``eval`` part of ``metrics.json``: accuracies in 0..1 overall and per task, what to hold them against, and
        a verdict in words where the images were exchanged too."""
        tasks = defaultdict(list)
        for index, question in enumerate(self.questions):
            tasks[question.task].append(index)
        per_task = {task: self._of_task(indices) for task, indices in sorted(tasks.items())}
        overall = {"accuracy": accuracy(self.questions, self.answers[AFTER])}
        for name, answers in self.answers.items():
            if name != AFTER:
                overall[f"accuracy_{name}"] = accuracy(self.questions, answers)
        hits = sum(task["majority"] * task["samples"] for task in per_task.values())
        overall["accuracy_majority"] = hits / len(self.questions)
        if SHUFFLED in self.answers:
            overall["verdict"] = verdict(self.questions, self.answers[AFTER], self.answers[SHUFFLED])
        return {**overall, "per_task": per_task}

    def _of_task(self, indices: Sequence[int]) -> dict[str, Any]:
        questions = [self.questions[index] for index in indices]
        answers = {name: [given[index] for index in indices] for name, given in self.answers.items()}
        others = {name: accuracy(questions, given) for name, given in answers.items() if name != AFTER}
        record = {"accuracy": accuracy(questions, answers[AFTER]), "samples": len(questions), **others}
        record |= {"majority": majority(questions), "free_text": is_free_text(questions)}
        return record | {"classes": by_class(questions, answers[AFTER])}

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
        "question": display_text(question.messages[-1]).strip(),
        "answer": question.answer,
    }
