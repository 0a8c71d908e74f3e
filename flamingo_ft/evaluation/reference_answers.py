"""What the reference answers of a task are: classes or free text, and which is the most frequent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.model.boxes import without_boxes

from .metrics import normalize
from .questions import Question

MAX_CLASSES = 20  # distinct reference answers; with more, classes are not scored separately
MIN_SAMPLES_PER_CLASS = 2  # on average
FREE_TEXT_WORDS = 4  # median length of the reference answers; shorter ones are not free text


def most_frequent_answer(questions: Sequence[Question]) -> str:
    """Return the most frequent reference answer, as it is first written."""
    written = {}
    for question in questions:
        written.setdefault(normalize(question.answer), question.answer)
    counts = Counter(normalize(question.answer) for question in questions)
    return written[counts.most_common(1)[0][0]]


def majority_answers(questions: Sequence[Question]) -> list[str]:
    """Return the most frequent reference answer of each question's task."""
    answers = [""] * len(questions)
    for indices in by_task(questions).values():
        answer = most_frequent_answer([questions[index] for index in indices])
        for index in indices:
            answers[index] = answer
    return answers


def by_task(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Return the indices of each task's questions."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        indices[question.task].append(index)
    return indices


def classes_of(questions: Sequence[Question]) -> dict[str, list[int]] | None:
    """Return the classes of a task, its distinct reference answers, and the indices of their questions.

    A class is called as its answer is first written; the most frequent come first. Returns None if there is
    only one class, or too many for the number of samples.
    """
    written: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        key = normalize(question.answer)
        written.setdefault(key, question.answer)
        members.setdefault(key, []).append(index)
    if not 2 <= len(members) <= min(MAX_CLASSES, len(questions) // MIN_SAMPLES_PER_CLASS):
        return None
    ordered = sorted(members, key=lambda key: (-len(members[key]), written[key]))
    return {written[key]: members[key] for key in ordered}


def is_free_text(questions: Sequence[Question]) -> bool:
    """Whether the reference answers are captions or sentences, which can be phrased in many ways.

    Captions that are a few short ones are classes, such as the names of the folders that images are in.
    """
    lengths = sorted(len(_words(question)) for question in questions)
    is_long = lengths[len(lengths) // 2] >= FREE_TEXT_WORDS
    if any(message["role"] == DOCUMENT for question in questions for message in question.messages):
        return is_long or classes_of(questions) is None
    distinct = len({normalize(question.answer) for question in questions})
    return is_long and distinct > len(questions) / 2


def _words(question: Question) -> list[str]:
    """Return the words of a reference answer; its boxes are not among them."""
    return (without_boxes(question.answer) if question.boxes else question.answer).split()


def has_free_text(questions: Sequence[Question]) -> bool:
    """Whether the reference answers of any task are free text."""
    tasks = by_task(questions).values()
    return any(is_free_text([questions[index] for index in indices]) for indices in tasks)
