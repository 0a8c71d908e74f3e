"""A metric is one entry of a registry: registered once, every part of the package computes, shows and selects
by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from flamingo_ft import train
from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.config import tables
from flamingo_ft.evaluation.merge_quality import HELD_OUT, EvalSet, Measurement, compare
from flamingo_ft.evaluation.metrics import LOSS, METRICS, Metric, register_metric
from flamingo_ft.report import write_report
from flamingo_ft.report.run_folder import read_log
from tests import regimes


def test_every_metric_that_a_recipe_can_name_is_registered_and_no_other():
    assert {LOSS, *METRICS} == {*tables.METRIC_DESCRIPTIONS}


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_name_is_registered_once(name):
    with pytest.raises(ValueError, match=f"'{name}' is already registered"):
        register_metric(Metric(name, lambda prediction, references: 0.0, label=name))


def length_error(prediction, references):
    return min(abs(len(prediction) - len(reference)) for reference in references)


@pytest.fixture
def metric():
    """A made-up metric, registered in this one place; lower is better."""
    metric = Metric(
        "length_error",
        score=length_error,
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


def test_a_metric_registered_in_one_place_is_everywhere(metric, tmp_path, monkeypatch, capsys):
    regimes.write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluated = ("data.eval=[{path: train.jsonl}]", "eval={steps: 1, metric: length_error, keep: best}")
    metrics = train(regimes.recipe("train.max_steps=2", "train.logging_steps=1", *evaluated))
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
    page = write_report("run").read_text()
    assert "Length error on held-out samples" in page and "held-out length error" in page
    assert f"{evaluation['length_error']:.0f} characters" in page

    console = Console(width=200, record=True)
    for table in evaluation_tables(evaluation):
        console.print(table)
    text = console.export_text()
    assert "length error on held-out samples" in text and "accuracy on held-out samples" in text
    assert f"{evaluation['length_error']:.0f} characters" in text

    card = Path("run/README.md").read_text()
    assert "Length error on held-out samples" in card and "Characters too many or too few" in card


@pytest.mark.parametrize(("error", "worse"), [(3.0, True), (1.0, False)])
def test_a_metric_with_a_margin_decides_whether_a_merged_model_is_worse(metric, error, worse):
    def measured(error):
        return Measurement([1.0, 1.0], [1, 1], {"accuracy": [1, 1], "length_error": [error, error]}, None)

    models = {"adapter": measured(0.0), "merged": measured(error)}
    record = compare(models, EvalSet([], [], HELD_OUT), loss_margin=0.5, accuracy_margin=0.1)
    assert record["length_error_drop"] == error and record["worse"] == worse
