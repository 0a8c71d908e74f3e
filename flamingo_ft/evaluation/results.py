"""Answers of an evaluation: predictions.jsonl, the ``eval`` record of metrics.json, and score tables.

The record ends with a verdict: whether the model uses its images, by its answers to the same questions with
other images.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.adapters.card import CardTable
from flamingo_ft.atomic import file_in_place
from flamingo_ft.config import PREDICTIONS_FILE
from flamingo_ft.data.media import preview
from flamingo_ft.data.sample import UNNAMED_TASK, display_text
from flamingo_ft.formatting import plural

from .image_loss_gap import ImageLossGap
from .image_use import image_use
from .loss_by_kind import LossByKind, loss_record
from .metrics import (
    ACCURACY,
    Metric,
    Prediction,
    capitalized,
    metrics_in,
    normalize,
    user_metrics_record,
)
from .pair_rewards import PairRewards
from .question_boxes import boxes_record
from .questions import Question
from .reference_answers import by_task, classes_of, is_free_text, majority_answers
from .scores import Scores

# Conditions under which questions are asked.
BEFORE, AFTER, SHUFFLED, BLANK = "before", "after", "shuffled_images", "blank_images"
MAJORITY = "majority"  # baseline: always give the most frequent reference answer
COLUMNS = (MAJORITY, BEFORE, AFTER, SHUFFLED, BLANK)  # of score tables, in this order
COLUMN_HEADERS = {
    MAJORITY: "majority answer",
    BEFORE: "before",
    AFTER: "after",
    SHUFFLED: "with another image",
    BLANK: "with a gray image",
}
Answers = Mapping[str, Sequence[Prediction]]  # by condition


def label_of_condition(condition: str) -> str:
    """Return a condition in words: ``with another image``; a task has further ones."""
    return COLUMN_HEADERS.get(condition, f"with {condition.replace('_', ' ')}")


def shown_name(task: str, tasks: Collection[str]) -> str:
    """Return what a task is called in tables: ``all`` if it is the only one and has no name."""
    return "all" if {*tasks} == {UNNAMED_TASK} else task


def overall_key(metric: Metric, column: str) -> str:
    """Return the key of a score over all tasks: ``accuracy``, ``accuracy_before``, ..."""
    return metric.name if column == AFTER else f"{metric.name}_{column}"


def task_key(metric: Metric, column: str) -> str:
    """Return the key of a score of one task. Accuracy's are the bare column: ``accuracy``, ``before``, ..."""
    return column if metric is ACCURACY and column != AFTER else overall_key(metric, column)


def samples_key(metric: Metric) -> str:
    """Return the key of the number of questions that a metric of some questions only is defined on."""
    return f"{metric.name}_samples"


@dataclass
class Results:
    """Answers to the same questions under several conditions: ``BEFORE``, ``AFTER`` and ``SHUFFLED``.

    metrics: what the answers are scored by. image_loss_gap: that of the final model, if it was measured.
    loss_by_kind: the losses ``BEFORE`` and ``AFTER`` training, if there are rows without images. pairs: the
    rewards of held-out pairs, after DPO and KTO.
    """

    questions: Sequence[Question]
    answers: dict[str, Sequence[Prediction]] = field(default_factory=dict)
    metrics: Sequence[Metric] = (ACCURACY,)
    image_loss_gap: ImageLossGap | None = None
    loss_by_kind: dict[str, LossByKind] = field(default_factory=dict)
    pairs: PairRewards | None = None

    @property
    def conditions(self) -> list[str]:
        """The conditions asked so far, ``AFTER`` first."""
        return sorted(self.answers, key=lambda condition: condition != AFTER)

    def texts(self, condition: str) -> list[str]:
        """Return the answers under a condition as text; of ranked labels, the best."""
        return [str(answer) for answer in self.answers[condition]]

    def summary(self) -> dict[str, Any]:
        """Return the ``eval`` record of metrics.json: metrics, overall and per task, and their baselines.

        A metric that is not defined on the answers is None, such as F1 without a positive one; of a metric of
        some questions only, such as those with boxes, ``<name>_samples`` is their number. With answers
        to other images, ``verdict`` says in a sentence whether the model uses its images. ``rows`` is the
        number of rows that the questions are from, if some have several, and ``boxes`` that of questions
        with boxes in their answers, if any. ``image_loss_gap``, ``loss_by_kind`` and ``pairs`` are there if
        they were measured.
        """
        tasks = by_task(self.questions)
        scores = self._scores()
        record = self._values(scores, None, overall_key)
        per_task = {task: self._task_record(scores, indices) for task, indices in sorted(tasks.items())}
        record |= user_metrics_record(self.metrics)
        rows = len({question.sample for question in self.questions})
        if 1 < rows < len(self.questions):  # questions without data are all of sample 0
            record["rows"] = rows
        if boxes := sum(bool(question.boxes) for question in self.questions):
            record["boxes"] = boxes
        gap = self.image_loss_gap
        if gap is not None:
            record["image_loss_gap"] = asdict(gap)
        if self.loss_by_kind:
            record["loss_by_kind"] = loss_record(self.loss_by_kind)
        if self.pairs is not None:
            record["pairs"] = asdict(self.pairs)
        if SHUFFLED in self.answers:
            record["verdict"] = image_use(self.questions, self.texts(AFTER), self.texts(SHUFFLED), gap)
        return {**record, "per_task": per_task}

    def _scores(self) -> Scores:
        """Score the answers, and as a baseline the most frequent reference answer of each question's task."""
        answers = {condition: self.answers[condition] for condition in self.conditions}
        baseline = {MAJORITY: majority_answers(self.questions)}
        return Scores.of(self.metrics, self.questions, answers, baseline)

    def _values(
        self, scores: Scores, indices: Sequence[int] | None, key: Callable[[Metric, str], str]
    ) -> dict[str, Any]:
        """Return every metric under every condition over a part of the questions; key: its name there."""
        values = {
            key(metric, condition): scores.value(metric, condition, indices)
            for metric in self.metrics
            for condition in scores.statistics[metric.name]
        }
        counts = {
            samples_key(metric): scores.count(metric, indices) for metric in self.metrics if metric.only
        }
        return values | counts

    def _task_record(self, scores: Scores, indices: Sequence[int]) -> dict[str, Any]:
        questions = [self.questions[index] for index in indices]
        record = {"samples": len(questions), **self._values(scores, indices, task_key)}
        record["free_text"] = is_free_text(questions)
        record["classes"] = self._class_records(scores, indices)
        return record

    def _class_records(self, scores: Scores, indices: Sequence[int]) -> dict[str, dict[str, Any]] | None:
        """Score the questions of each class of a task separately; None for a task without classes.

        Returns for each class the number of its ``samples``, the metrics on them, and how often it was
        ``predicted``.
        """
        classes = classes_of([self.questions[index] for index in indices])
        if classes is None:
            return None
        answers = self.texts(AFTER)
        predicted = Counter(normalize(answers[index]) for index in indices)
        metrics = [metric for metric in self.metrics if metric.by_class]
        records = {}
        for answer, members in classes.items():
            own = [indices[member] for member in members]
            values = {metric.name: scores.value(metric, AFTER, own) for metric in metrics}
            records[answer] = {"samples": len(own), **values, "predicted": predicted[normalize(answer)]}
        return records

    def save(self, folder: Path, variants: Mapping[str, Answers] | None = None) -> None:
        """Write predictions.jsonl: each question with its images, reference answers and every answer.

        variants: answers of further models, written under ``variants``.
        """
        with file_in_place(folder / PREDICTIONS_FILE) as place, place.open("w", encoding="utf-8") as file:
            for index, question in enumerate(self.questions):
                texts = _texts_at(index, self.answers)
                row: dict[str, Any] = _row(question) | texts | boxes_record(question, texts)
                if variants:
                    row["variants"] = {name: _texts_at(index, answers) for name, answers in variants.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def restore(self, condition: str, folder: Path) -> None:
        """Read the answers of one condition from predictions.jsonl, if that has the same questions."""
        rows = load_predictions(folder) if (folder / PREDICTIONS_FILE).is_file() else []
        same = [row["where"] for row in rows] == [question.where for question in self.questions]
        if same and all(condition in row for row in rows):
            self.answers[condition] = [row[condition] for row in rows]


def load_predictions(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of predictions.jsonl."""
    with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _texts_at(index: int, answers: Answers) -> dict[str, str]:
    """Return the answers to one question by condition."""
    return {condition: str(given[index]) for condition, given in answers.items()}


def _row(question: Question) -> dict[str, Any]:
    """Return what a row says of its question. ``references`` are there if there are several."""
    row = {
        "where": question.where,
        "task": question.task,
        "images": [preview(medium) for medium in question.images],
        "question": display_text(question.messages[-1]).strip(),
        "answer": question.answer,
    }
    return row | ({"references": question.references} if question.other_answers else {})


def with_scores_before(evaluation: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ``eval`` record with the scores `BEFORE` of an earlier one on the same questions."""
    merged = copy.deepcopy(dict(evaluation))
    for metric in metrics_in(evaluation):
        records = [(merged, earlier, overall_key(metric, BEFORE))]
        records += [
            (task, earlier["per_task"][name], task_key(metric, BEFORE))
            for name, task in merged["per_task"].items()
            if name in earlier.get("per_task", {})
        ]
        for record, source, key in records:
            if key in source:
                record[key] = source[key]
    for kind, losses in merged.get("loss_by_kind", {}).items():
        before = (earlier.get("loss_by_kind") or {}).get(kind, {})
        losses |= {BEFORE: before[BEFORE]} if BEFORE in before else {}
    return merged


@dataclass(frozen=True)
class TaskScores:
    """One row of a score table. values: one per column; None where it was not measured."""

    samples: int
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one metric, for the terminal, the report and the model card.

    columns: those of `COLUMNS` that were measured. tasks: rows by task, of those that the metric is defined
    on; overall: the row over them. questions: of all tasks; boxes: those of them with boxes in their answers.
    data_rows: rows of data that the questions are from; None if each has one question.
    """

    metric: Metric
    columns: tuple[str, ...]
    tasks: dict[str, TaskScores]
    overall: TaskScores
    all_tasks: tuple[str, ...]
    questions: int
    boxes: int = 0
    data_rows: int | None = None

    @property
    def shown_tasks(self) -> dict[str, TaskScores]:
        """The rows above the one over all tasks; none for a single task, whose scores are the same."""
        return self.tasks if len(self.tasks) > 1 else {}

    @property
    def overall_name(self) -> str:
        """The name of the row over all tasks: that of a single task, if it has one."""
        return shown_name(next(iter(self.tasks)), self.all_tasks) if len(self.tasks) == 1 else "all"

    @property
    def label(self) -> str:
        """What is scored; if answers with boxes are scored by another metric, also by which."""
        return self.metric.label_with(self.boxes)

    @property
    def title(self) -> str:
        """What is scored, and on what."""
        return f"{capitalized(self.label)} on {self.subject}"

    @property
    def subject(self) -> str:
        """What the scores are of, in words, with the number of questions where that of rows differs."""
        questions = plural(self.overall.samples, "question")
        if self.overall.samples < self.questions:
            return f"held-out samples: {questions} {self.metric.only}"
        if self.data_rows is None:
            return "held-out samples"
        return f"held-out samples: {questions} in {plural(self.data_rows, 'row')}"


def score_tables(evaluation: Mapping[str, Any] | None) -> list[ScoreTable]:
    """Return a table for each metric in the ``eval`` record of a metrics.json, if there is one."""
    if not evaluation:
        return []
    return [_table(metric, evaluation) for metric in metrics_in(evaluation)]


def _table(metric: Metric, evaluation: Mapping[str, Any]) -> ScoreTable:
    measured = tuple(column for column in COLUMNS if evaluation.get(overall_key(metric, column)) is not None)
    per_task = evaluation["per_task"]
    tasks = {
        name: TaskScores(
            record.get(samples_key(metric), record["samples"]),  # which earlier versions did not write
            tuple(record.get(task_key(metric, column)) for column in measured),
        )
        for name, record in per_task.items()
        if not metric.only or record.get(task_key(metric, AFTER)) is not None
    }
    samples = sum(task.samples for task in tasks.values())
    overall = TaskScores(samples, tuple(evaluation[overall_key(metric, column)] for column in measured))
    questions, boxes = sum(record["samples"] for record in per_task.values()), evaluation.get("boxes", 0)
    return ScoreTable(
        metric, measured, tasks, overall, tuple(per_task), questions, boxes, evaluation.get("rows")
    )


def card_tables(evaluation: Mapping[str, Any] | None) -> list[CardTable]:
    """Return `score_tables` as text for the model card."""
    return [_card_table(table) for table in score_tables(evaluation)]


def _card_table(table: ScoreTable) -> CardTable:
    metric = table.metric

    shown = {**table.shown_tasks, table.overall_name: table.overall}
    rows = [[task, f"{row.samples:,}", *map(metric.text, row.values)] for task, row in shown.items()]
    description, hub_type = metric.description or metric.label, metric.hub_type or metric.name
    if table.boxes and metric.of_boxes is not None:
        description, hub_type = f"{description}; with boxes, {metric.of_boxes.label}", metric.name
    after = table.columns.index(AFTER)
    scores = {"all": table.overall.values[after]}
    if len(table.tasks) > 1:
        scores |= {task: row.values[after] for task, row in table.tasks.items()}
    return CardTable(
        title=table.title,
        description=description,
        hub_type=hub_type,
        columns=[COLUMN_HEADERS[column] for column in table.columns],
        rows=rows,
        values={task: value for task, value in scores.items() if value is not None},
    )


@dataclass(frozen=True)
class ClassScores:
    """One reference answer of a task with few of them. predicted: how often it was given."""

    task: str
    answer: str
    samples: int
    values: tuple[float | None, ...]
    predicted: int


def class_scores(evaluation: Mapping[str, Any] | None, metrics: Sequence[Metric]) -> list[ClassScores]:
    """Return the scores of every class of every task that has classes, by the given metrics."""
    tasks = (evaluation or {}).get("per_task", {})
    return [
        ClassScores(
            shown_name(task, tasks),
            answer,
            record["samples"],
            tuple(record.get(m.name) for m in metrics),
            record["predicted"],
        )
        for task, scores in tasks.items()
        for answer, record in (scores.get("classes") or {}).items()
    ]
