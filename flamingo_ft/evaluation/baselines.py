"""What an accuracy is to be held against: the most frequent answer, each class by itself, whether exact match fits at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flamingo_ft.data.sample import DOCUMENT

from .accuracy import is_right, normalise
from .questions import Question

MOST_CLASSES = 20  # distinct reference answers up to which each is a class
LEAST_SAMPLES_PER_CLASS = 2  # on average
LONG_ANSWER = 4  # words from which on a reference answer is free text


def majority(questions: Sequence[Question]) -> float:
    """Accuracy, 0..1, of always giving the most frequent reference answer."""
    counts = Counter(normalise(question.answer) for question in questions)
    return counts.most_common(1)[0][1] / len(questions)


def by_class(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """For each distinct reference answer: how many ``samples`` have it, the ``accuracy`` on those (0..1), and how often it
    was ``predicted`` at all. None where there are too many of them, or only one."""
    names = {}
    for question in questions:
        names.setdefault(normalise(question.answer), question.answer)
    if not 2 <= len(names) <= min(MOST_CLASSES, len(questions) // LEAST_SAMPLES_PER_CLASS):
        return None
    samples = Counter(normalise(question.answer) for question in questions)
    right = Counter(
        normalise(q.answer) for q, answer in zip(questions, answers, strict=True) if is_right(q, answer)
    )
    predicted = Counter(map(normalise, answers))
    return {
        name: {"samples": samples[key], "accuracy": right[key] / samples[key], "predicted": predicted[key]}
        for key, name in sorted(names.items(), key=lambda item: (-samples[item[0]], item[1]))
    }


def is_free_text(questions: Sequence[Question]) -> bool:
    """Whether the reference answers are captions or sentences, which can be said rightly in other words."""
    if any(message["role"] == DOCUMENT for question in questions for message in question.messages):
        return True
    lengths = sorted(len(question.answer.split()) for question in questions)
    distinct = len({normalise(question.answer) for question in questions})
    return lengths[len(lengths) // 2] >= LONG_ANSWER and distinct > len(questions) / 2
