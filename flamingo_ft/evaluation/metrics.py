"""The registry of metrics that score generated answers, and exact-match accuracy, the built-in metric.

To add a metric:

1. Write its score function and register it below `ACCURACY`: ``register_metric(Metric("f1", score=f1))``.
2. Add ``"f1": "what it measures; higher is better"`` to ``METRIC_DESCRIPTIONS`` in
   `flamingo_ft/config/tables.py`, from which the recipe schema is generated.
3. Regenerate the two files that list it::

       flamingo-ft recipes schema > recipes/recipe.schema.json &&
       flamingo-ft recipes keys --markdown > recipes/README.md

Training logs it as ``eval_f1``, metrics.json, tables, figures, the report and the model card show it, and
``eval.metric: f1`` selects the best checkpoint by it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config import tables
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.formatting import percent

from .questions import Question

LOSS = "loss"  # the value of `eval.metric` that needs no generated answers
MAX_CLASSES = 20  # distinct reference answers; with more, classes are not scored separately
MIN_SAMPLES_PER_CLASS = 2  # on average
FREE_TEXT_WORDS = 4  # median length of the reference answers; shorter ones are not free text

# Suffixes that turn a metric's name into keys of metrics.json, merge.json and the log.
KEY_SUFFIXES = ("", "_before", "_shuffled_images", "_majority", "_drop", "_drop_standard_error", "_margin")
# Names that a metric must not use: other keys of these records, and the report's other figures.
RESERVED_KEYS = frozenset(
    {"before", "shuffled_images", "majority", "samples", "free_text", "classes", "predicted"}
    | {"verdict", "per_task", "step"}
    | {"image_loss_gap", "image_loss_gap_standard_error", "image_loss_gap_samples"}
    | {"label_tokens", "answers", "loss", "loss_increase", "loss_increase_standard_error"}
    | {"margin", "worse"}
    | {"entropy", "mean_token_accuracy", "num_tokens"}  # TRL's, in the log
    | {"reward_margin", "reward_accuracy", "gates", "gates_by_layer", "learning_rate", "gradient_norm"}
    | {"throughput", "memory"}
)


def mean(scores: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(scores) / len(scores)


def ratio_standard_error(differences: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the standard error of sum(differences) / sum(sizes), a ratio estimator.

    It is 0 for a single sample, whose spread is unknown.
    """
    count, total = len(differences), sum(sizes)
    if count < 2:
        return 0.0
    mean = sum(differences) / total
    squares = sum((d - mean * size) ** 2 for d, size in zip(differences, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


@dataclass(frozen=True)
class Metric:
    """One way to score generated answers.

    name: key in metrics.json, in the log (``eval_<name>``) and in the recipe (``eval.metric``).
    score: (prediction, reference answers) -> score of the prediction.
    label: name in tables and figures (titles capitalize it).
    description: phrase for the model card that says what is measured; by default the label.
    aggregate: scores of all questions -> value of the metric.
    higher_is_better: whether larger values are better; decides the best checkpoint and merging.
    format: value -> text; `percent`, the default, means that values are fractions in 0..1.
    axis: label of the figure's y axis; by default the label.
    hub_type: identifier of the metric on the Hugging Face Hub; by default the name.
    merge_margin: how much worse than its adapter a merged model may be; None: reported, but not checked.
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
        """Return the score of each prediction."""
        return [self.score(p, q.references) for q, p in zip(questions, predictions, strict=True)]

    def evaluate(self, questions: Sequence[Question], predictions: Sequence[str]) -> float:
        """Return the value of the metric over all predictions."""
        return self.aggregate(self.scores(questions, predictions))

    def majority_baseline(self, questions: Sequence[Question]) -> float:
        """Return the value reached by always giving the most frequent reference answer."""
        return self.evaluate(questions, [most_frequent_answer(questions)] * len(questions))

    @property
    def title(self) -> str:
        """The label, capitalized."""
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
    """Add a metric to the registry and to the values of ``eval.metric``.

    Raises ValueError if the name is registered already, or if keys derived from it are in use.
    """
    if metric.name in METRICS or metric.name == LOSS:
        raise ValueError(f"metric {metric.name!r} is already registered; choose another name")
    used_keys = RESERVED_KEYS.union(*map(_keys, METRICS))
    if collisions := sorted(_keys(metric.name) & used_keys):
        raise ValueError(
            f"metric {metric.name!r}: keys of its results are in use ({', '.join(collisions)}); "
            "choose another name"
        )
    METRICS[metric.name] = metric
    tables.METRIC_DESCRIPTIONS.setdefault(metric.name, metric.description or metric.label)


def _keys(name: str) -> set[str]:
    """Return every key under which results of a metric are stored."""
    return {f"{name}{suffix}" for suffix in KEY_SUFFIXES}


def evaluate_metrics(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Return the value of every registered metric by name."""
    return {name: metric.evaluate(questions, predictions) for name, metric in METRICS.items()}


def higher_is_better(name: str) -> bool:
    """Return whether larger values of what ``eval.metric`` names are better."""
    return name != LOSS and METRICS[name].higher_is_better


def normalize(text: str) -> str:
    """Return an answer as exact match compares it: case, extra spaces and final punctuation removed."""
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
MERGE_METRIC = ACCURACY  # `flamingo-ft merge --accuracy-margin` replaces the merge_margin of this metric


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
    """Score the questions of each distinct reference answer, a class, separately.

    Returns for each class the number of its ``samples``, every metric on them, and how often the class was
    ``predicted``. Returns None if there is only one class, or too many for the number of samples.
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
    """Whether the reference answers are captions or sentences, which can be phrased in many ways."""
    if any(message["role"] == DOCUMENT for question in questions for message in question.messages):
        return True
    lengths = sorted(len(question.answer.split()) for question in questions)
    distinct = len({normalize(question.answer) for question in questions})
    return lengths[len(lengths) // 2] >= FREE_TEXT_WORDS and distinct > len(questions) / 2
