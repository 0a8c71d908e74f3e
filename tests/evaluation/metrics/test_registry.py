"""A metric is one entry of a registry: a run that names it computes it, shows it and selects by it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flamingo_ft import train
from flamingo_ft.cli.metrics_table import evaluation_lines, evaluation_tables
from flamingo_ft.config import tables
from flamingo_ft.config.library import SCHEMA_FILE, library_folder
from flamingo_ft.config.metric_names import LOSS
from flamingo_ft.evaluation.merge_quality import HELD_OUT, EvalSet, Measurement, compare
from flamingo_ft.evaluation.metrics import (
    ACCURACY,
    KEY_SUFFIXES,
    METRICS,
    RESERVED_KEYS,
    Metric,
    per_pair,
    register_metric,
)
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.results import AFTER, BEFORE, BLANK, SHUFFLED, Results, score_tables
from flamingo_ft.report import page, write_report
from flamingo_ft.report.run_folder import read_log
from tests import regimes


def test_every_metric_that_a_recipe_can_name_is_registered_and_no_other():
    assert {LOSS, *METRICS} == {*tables.METRIC_DESCRIPTIONS}
    schema = json.loads((library_folder() / SCHEMA_FILE).read_text())  # written without the registry
    keys = schema["$defs"]["EvalSection"]["properties"]
    assert keys["metric"]["anyOf"][0]["enum"] == [LOSS, *METRICS]
    assert keys["metrics"]["anyOf"][0]["items"]["anyOf"][0]["enum"] == [*METRICS]


def made_up(name: str) -> Metric:
    return Metric(name, per_pair(lambda prediction, references: 0.0), label=name)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_name_is_registered_once(name):
    with pytest.raises(ValueError, match=f"'{name}' is already registered"):
        register_metric(made_up(name))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("samples", "samples"),
        ("loss_increase", "loss_increase"),
        ("gates", "gates"),
        ("accuracy_majority", "accuracy_majority"),
        ("accuracy_drop", "accuracy_drop"),
        ("reward", "reward, reward_margin"),
    ],
)
def test_a_name_whose_keys_are_in_use_is_refused(name, keys):
    message = f"metric '{name}': keys of its results are in use ({keys}); choose another name"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        register_metric(made_up(name))
    assert name not in METRICS and name not in tables.METRIC_DESCRIPTIONS


def question(task: str, answer: str, *images: str) -> Question:
    content = [{"type": "text", "text": "Which?"}]
    return Question([{"role": "user", "content": content}], images, answer=answer, task=task)


def test_every_key_of_a_record_belongs_to_a_metric_or_is_reserved():
    computed = [METRICS[name] for name in ("accuracy", "anls", "rouge_l", "cider_d", "f1", "iou")]
    questions = [question("t", answer, "a.png") for answer in ("yes", "no") * 2]
    answers = dict.fromkeys((BEFORE, AFTER, SHUFFLED, BLANK), ["yes"] * 4)
    summary = Results(questions, answers, computed).summary()
    task = summary["per_task"]["t"]
    statistics = {metric.name: metric.measure(questions, answers[AFTER]) for metric in computed}
    measurement = Measurement([1.0], [1], statistics, None)
    models = {"adapter": measurement, "merged": measurement}
    eval_set = EvalSet([], [], HELD_OUT, metrics=computed)
    merge = compare(models, eval_set, loss_margin=0.5, accuracy_margin=0.1)
    keys = {*summary, *task, *task["classes"]["yes"], *merge, *page._log_figures(computed), "step"}
    of_metrics = {f"{metric.name}{suffix}" for metric in computed for suffix in KEY_SUFFIXES} - {
        f"{metric.name}_samples" for metric in computed if not metric.only
    }
    assert keys <= of_metrics | RESERVED_KEYS and keys > of_metrics


def length_error(prediction, references):
    return min(abs(len(prediction) - len(reference)) for reference in references)


@pytest.fixture
def metric():
    """A made-up metric, registered in this one place; lower is better."""
    metric = Metric(
        "length_error",
        per_pair(length_error),
        aggregate=max,
        higher_is_better=False,
        label="length error",
        description="characters too many or too few",
        format="{:.0f} characters".format,
        axis="characters",
        merge_margin=2.0,
    )
    register_metric(metric)
    yield metric
    for table in (METRICS, tables.METRIC_DESCRIPTIONS):
        del table[metric.name]


def test_a_metric_registered_in_one_place_is_everywhere(metric, whole_runs, tmp_path, monkeypatch, capsys):
    regimes.write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluated = ("data.eval=[{path: train.jsonl}]", "eval={steps: 1, metric: length_error, keep: best}")
    names = ("eval.metrics=[accuracy]",)  # a metric that selects is computed even if it is not among them
    metrics = train(regimes.recipe("train.max_steps=2", "train.logging_steps=1", *evaluated, *names))
    evaluation = json.loads(Path("run/metrics.json").read_text())["eval"]
    for key in (
        "length_error",
        "length_error_before",
        "length_error_shuffled_images",
        "length_error_majority",
    ):
        assert evaluation[key] >= 0
        assert all(task[key] >= 0 for task in evaluation["per_task"].values())

    logged = {
        entry["step"]: entry["eval_length_error"] for entry in read_log(Path("run")) if "eval_loss" in entry
    }
    best = metrics["train"]["best"]
    assert [*logged] == [1, 2] and best["length_error"] == logged[best["step"]] == min(logged.values())
    assert f"length error {logged[2]:.0f} characters" in capsys.readouterr().out

    assert Path("run/figures/length_error.png").is_file()
    report = write_report("run").read_text()
    assert "Length error on held-out samples" in report and "held-out length error" in report
    assert f"{evaluation['length_error']:.0f} characters" in report

    console = Console(width=200, record=True)
    for table in evaluation_tables(evaluation):
        console.print(table)
    text = console.export_text()
    assert "length error on held-out samples" in text and "accuracy on held-out samples" in text
    assert f"{evaluation['length_error']:.0f} characters" in text

    card = Path("run/README.md").read_text()
    assert "Length error on held-out samples" in card and "Characters too many or too few" in card


def measured(errors) -> Measurement:
    """Two questions, all right, with these length errors."""
    statistics = {"accuracy": np.array([1.0, 1.0]), "length_error": np.array(errors)}
    return Measurement([1.0, 1.0], [1, 1], statistics, None)


@pytest.mark.parametrize(("error", "worse"), [(3.0, True), (1.0, False)])
def test_a_metric_with_a_margin_decides_whether_a_merged_model_is_worse(metric, error, worse):
    models = {"adapter": measured([0.0, 0.0]), "merged": measured([error, error])}
    eval_set = EvalSet([], [], HELD_OUT, metrics=(ACCURACY, metric))
    record = compare(models, eval_set, loss_margin=0.5, accuracy_margin=0.1)
    assert record["length_error_drop"] == error and record["worse"] == worse


def test_the_majority_over_all_tasks_and_the_drop_of_a_merge_use_the_aggregate_of_the_metric(metric):
    questions = [
        question("short", "no"),
        question("short", "no"),
        question("long", "a"),
        question("long", "abcd"),
    ]
    summary = Results(questions, {AFTER: ["no"] * 4}, [ACCURACY, metric]).summary()
    assert summary["length_error_majority"] == 3  # the largest error, of answering "a" for "abcd"
    models = {"adapter": measured([0.0, 4.0]), "merged": measured([3.0, 4.0])}
    eval_set = EvalSet([], [], HELD_OUT, metrics=(ACCURACY, metric))
    record = compare(models, eval_set, loss_margin=0.5, accuracy_margin=0.1)
    assert record["length_error"] == {"adapter": 4.0, "merged": 4.0} and record["length_error_drop"] == 0.0


def test_a_class_line_names_each_metric_and_leaves_out_what_was_not_measured(metric):
    classes = {
        "Even.": {"accuracy": 0.95, "length_error": 3.0, "samples": 1900, "predicted": 1800},
        "Odd.": {"accuracy": 0.97, "samples": 170, "predicted": 175},  # written before the metric existed
    }
    record = {"accuracy": 0.95, "length_error": 3.0, "per_task": {"parity": {"classes": classes}}}
    (line,) = evaluation_lines(record)
    assert line == (
        "parity: 'Even.' accuracy 95.0 % / length error 3 characters of 1,900, 'Odd.' 97.0 % of 170"
    )


def test_a_metric_that_is_not_defined_on_the_answers_is_reported_as_such():
    questions = [question("t", answer) for answer in ("red", "blue")]
    record = Results(questions, {AFTER: ["red", "red"]}, [ACCURACY, METRICS["f1"]]).summary()
    assert record["f1"] is None and record["per_task"]["t"]["f1"] is None
    assert [table.metric.name for table in score_tables(record)] == ["accuracy"]
    assert "F1: not defined on these answers" in evaluation_lines(record)
