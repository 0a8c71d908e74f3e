"""The registry of metrics that score generated answers, and exact-match accuracy, which is built in.

To add a metric, register it once, for example at the end of this file:

    register_metric(Metric("word_overlap", score=word_overlap, label="word overlap"))

It then appears in metrics.json, in the log of evaluations during training (as ``eval_word_overlap``), in
tables, figures, the report and the model card, and ``eval.metric: word_overlap`` selects the best checkpoint
by it. A line in `flamingo_ft.config.tables.METRIC_DESCRIPTIONS` makes the name known to recipes before this
module is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config import tables
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.formatting import percent

from .questions import Question

LOSS = "loss"  # the value of `eval.metric` that needs no generated answers
MAX_CLASSES = 20  # distinct reference answers up to which each counts as a class
MIN_SAMPLES_PER_CLASS = 2  # on average
FREE_TEXT_WORDS = 4  # median length of a reference answer from which on it is free text


def mean(scores: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class Metric:
    """One way to score generated answers.

    name: key in metrics.json, in the log (``eval_<name>``) and in the recipe (``eval.metric``).
    score: score of one prediction against its reference answers.
    label: name shown in tables and figures.
    description: what is measured, as a phrase, for the model card.
    aggregate: scores of all questions -> one value.
    higher_is_better: direction, for the best checkpoint and for merging.
    format: value -> text; `percent`, the default, means that values are fractions in 0..1.
    axis: label of the figure's y axis.
    hub_type: identifier of the metric on the Hugging Face Hub.
    merge_margin: how much worse a merged model may be than its adapter; None: reported, but decides nothing.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    label: str
    description: str = ""
    aggregate: Callable[[Sequence[float]], float] = mean
    higher_is_better: bool = True
    format: Callable[[float], str] = percent
    axis: str = ""
    hub_type: str = ""
    merge_margin: float | None = None

    def scores(self, questions: Sequence[Question], predictions: Sequence[str]) -> list[float]:
        """Return one score per question."""
        return [self.score(p, q.references) for q, p in zip(questions, predictions, strict=True)]

    def evaluate(self, questions: Sequence[Question], predictions: Sequence[str]) -> float:
        """Return the aggregated score of all predictions."""
        return self.aggregate(self.scores(questions, predictions))

    def majority_baseline(self, questions: Sequence[Question]) -> float:
        """Return the score of always giving the most frequent reference answer."""
        return self.evaluate(questions, [most_frequent_answer(questions)] * len(questions))

    @property
    def title(self) -> str:
        """The label as a heading begins."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def is_fraction(self) -> bool:
        """Whether values lie in 0..1 and are shown in percent."""
        return self.format is percent

    def text(self, value: float | None) -> str:
        """Return a value as text, such as ``42.0 %``; empty for None."""
        return "" if value is None else self.format(value)


METRICS: dict[str, Metric] = {}


def register_metric(metric: Metric) -> None:
    """Add a metric to the registry and to the values of ``eval.metric``. ValueError if the name is taken."""
    if metric.name in METRICS or metric.name == LOSS:
        raise ValueError(f"metric {metric.name!r} is already registered; choose another name")
    METRICS[metric.name] = metric
    tables.METRIC_DESCRIPTIONS.setdefault(metric.name, metric.description or metric.label)


def evaluate_metrics(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Return the value of every registered metric by name."""
    return {name: metric.evaluate(questions, predictions) for name, metric in METRICS.items()}


def higher_is_better(name: str) -> bool:
    """Return the direction of a value of ``eval.metric``."""
    return name != LOSS and METRICS[name].higher_is_better


def normalize(text: str) -> str:
    """Reduce an answer to what exact match compares: no case, outer spaces or final punctuation."""
    return " ".join(text.casefold().split()).rstrip(".!? ")


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference answer after `normalize`."""
    return normalize(prediction) in map(normalize, references)


ACCURACY = Metric(
    "accuracy",
    exact_match,
    label="accuracy",
    description="exact match of greedy answers",
    axis="correct answers",
    hub_type="exact_match",
    merge_margin=0.1,
)
register_metric(ACCURACY)


def most_frequent_answer(questions: Sequence[Question]) -> str:
    """Return the most frequent reference answer, as it is first written."""
    written = {}
    for question in questions:
        written.setdefault(normalize(question.answer), question.answer)
    counts = Counter(normalize(question.answer) for question in questions)
    return written[counts.most_common(1)[0][0]]


def scores_by_class(
    questions: Sequence[Question], predictions: Sequence[str]
) -> dict[str, dict[str, Any]] | None:
    """Treat each distinct reference answer as a class and score the classes separately.

    Returns, for each class, how many ``samples`` have it, every metric on those samples, and how often it was
    ``predicted``. None for a single class, and where there are too many for the number of samples.
    """
    written: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        key = normalize(question.answer)
        written.setdefault(key, question.answer)
        members.setdefault(key, []).append(index)
    if not 2 <= len(members) <= min(MAX_CLASSES, len(questions) // MIN_SAMPLES_PER_CLASS):
        return None
    predicted = Counter(map(normalize, predictions))
    record = {}
    for key in sorted(members, key=lambda key: (-len(members[key]), written[key])):
        indices = members[key]
        values = evaluate_metrics([questions[i] for i in indices], [predictions[i] for i in indices])
        record[written[key]] = {"samples": len(indices), **values, "predicted": predicted[key]}
    return record


def is_free_text(questions: Sequence[Question]) -> bool:
    """Whether the reference answers are captions or sentences, which can be phrased in many correct ways."""
    if any(message["role"] == DOCUMENT for question in questions for message in question.messages):
        return True
    lengths = sorted(len(question.answer.split()) for question in questions)
    distinct = len({normalize(question.answer) for question in questions})
    return lengths[len(lengths) // 2] >= FREE_TEXT_WORDS and distinct > len(questions) / 2
