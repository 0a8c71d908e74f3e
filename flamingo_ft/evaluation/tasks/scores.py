"""The scores of a task, as a record: values with intervals, controls with paired differences, by shots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flamingo_ft.config.metric_names import parse_metric
from flamingo_ft.evaluation.image_use import image_use
from flamingo_ft.evaluation.metrics import Metric, find_metrics
from flamingo_ft.evaluation.results import AFTER, SHUFFLED
from flamingo_ft.evaluation.scores import Scores, score_record

from .run import TaskAnswers
from .task import Task


def metrics_of(task: Task, more: Sequence[str] = ()) -> list[Metric]:
    """Return the metrics of a task, and ``more`` by name. Raises UserError for an unknown one."""
    return find_metrics([*task.metrics, *map(parse_metric, more)])


def task_record(run: TaskAnswers, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the scores of one run of a task.

    ``scores``: of each metric the ``value`` with its 95 % bootstrap interval, ``low`` and ``high``, and under
    ``controls`` that of each control, with its ``difference`` to the value. ``by_category``: the values of
    parts, if there are several. ``further``: the publisher's figures that are not means. ``verdict``: whether
    the images are used.
    """
    scores = Scores.of(metrics, run.questions, run.answers, {})
    record: dict[str, Any] = {
        "task": run.task.name,
        **asdict(run.protocol),
        "samples": len(run.questions),
        "samples_per_second": run.samples_per_second,
        "scores": {metric.name: score_record(metric, scores.statistics[metric.name]) for metric in metrics},
    }
    categories = sorted({question.task for question in run.questions})
    if len(categories) > 1:
        record["by_category"] = {name: _category(name, run, metrics, scores) for name in categories}
    texts = {name: [str(answer) for answer in answers] for name, answers in run.answers.items()}
    if run.task.further_scores is not None:
        record["further"] = run.task.further_scores(run.asked.examples, texts[AFTER])
    if SHUFFLED in texts:
        record["verdict"] = image_use(run.questions, texts[AFTER], texts[SHUFFLED])
    return record


def over_seeds(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and the standard deviation over the seeds of each metric, by number of shots."""
    summaries = []
    for shots in dict.fromkeys(record["shots"] for record in records):
        runs = [record for record in records if record["shots"] == shots]
        for name in runs[0]["scores"]:
            values = [run["scores"][name]["value"] for run in runs]
            defined = [value for value in values if value is not None]
            summaries.append(
                {
                    "shots": shots,
                    "metric": name,
                    "seeds": [run["seed"] for run in runs],
                    "mean": statistics.mean(defined) if defined else None,
                    "deviation": statistics.stdev(defined) if len(defined) > 1 else None,
                }
            )
    return summaries


def _category(
    name: str, run: TaskAnswers, metrics: Sequence[Metric], scores: Scores
) -> dict[str, float | int | None]:
    indices = [index for index, question in enumerate(run.questions) if question.task == name]
    values = {metric.name: scores.value(metric, AFTER, indices) for metric in metrics}
    return {"samples": len(indices), **values}
