"""The results of `train`, `eval` and `merge`, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from flamingo_ft.adapters.card import TextTable
from flamingo_ft.cli.output import titled_table
from flamingo_ft.evaluation.merge_quality import MADE_UP
from flamingo_ft.evaluation.metrics import ACCURACY, METRICS, Metric, metrics_in
from flamingo_ft.evaluation.results import (
    AFTER,
    BEFORE,
    BLANK,
    MAJORITY,
    SHUFFLED,
    ScoreTable,
    score_tables,
    shown_name,
)
from flamingo_ft.evaluation.run_tables import TRAINED, run_tables
from flamingo_ft.formatting import percent, plural

MAX_CLASSES = 5  # of a task whose classes are listed one by one
_COLUMNS = {
    MAJORITY: "majority",
    BEFORE: "before",
    AFTER: "after",
    SHUFFLED: "with another image",
    BLANK: "with a gray image",
}
_MERGE_MODELS = {
    "adapter": "adapter, as trained",
    "adapter_on_unquantized_base": "adapter on its unquantized base",
    "merged_before_quantization": "merged, before quantization",
    "merged": "merged",
}

NOT_EVALUATED = "not evaluated: the recipe has no held-out samples; set data.eval or data.eval_fraction"


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the metrics of a run or an evaluation (metrics.json)."""
    if metrics.get("eval"):
        for table in evaluation_tables(metrics["eval"]):
            Console().print(table)
        for line in evaluation_lines(metrics["eval"]):
            typer.echo(line)
    for table in run_tables(metrics):
        Console().print(_text_table(table))
    if metrics.get("train"):
        typer.echo(training_line(metrics["train"]))
        if not metrics.get("eval"):
            typer.echo(NOT_EVALUATED)


def _text_table(text: TextTable) -> Table:
    """Return a table for the terminal, without the wide column of what each stage trains."""
    table = titled_table(text.title)
    shown = [place for place, header in enumerate(text.columns) if header != TRAINED]
    for place in shown:
        table.add_column(text.columns[place], justify="right" if place else "left")
    for row in text.rows:
        table.add_row(*(row[place] for place in shown))
    return table


def print_merge_report(report: Mapping[str, Any]) -> None:
    """Print what `merge_adapter` returns."""
    Console().print(merge_table(report))
    typer.echo(merge_lines(report))


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Return a table for each metric in the ``eval`` record of metrics.json: tasks and total."""
    return [_evaluation_table(scores) for scores in score_tables(evaluation)]


def _evaluation_table(scores: ScoreTable) -> Table:
    metric = scores.metric
    headers = [_COLUMNS[column] for column in scores.columns]
    if BEFORE not in scores.columns and SHUFFLED not in scores.columns:
        headers = [metric.label if header == "after" else header for header in headers]
    table = Table(title=f"{scores.label} on {scores.subject}", title_justify="left")
    table.add_column("task")
    for header in ["questions", *headers]:
        table.add_column(header, justify="right")
    for name, row in scores.shown_tasks.items():
        table.add_row(name, f"{row.samples:,}", *map(metric.text, row.values))
    table.add_section()
    overall = scores.overall
    table.add_row(scores.overall_name, f"{overall.samples:,}", *map(metric.text, overall.values))
    return table


def evaluation_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines below the tables: scores by class, what a score leaves open, verdict, and advice."""
    metrics, tasks = metrics_in(evaluation), evaluation["per_task"]
    for name, task in tasks.items():
        classes = task.get("classes") or {}
        if 2 <= len(classes) <= MAX_CLASSES:
            scores = (f"{label!r} {_class_text(scores, metrics)}" for label, scores in classes.items())
            yield f"{shown_name(name, tasks)}: {', '.join(scores)}"
    for name, metric in METRICS.items():
        if name in evaluation and evaluation[name] is None:
            yield f"{metric.label}: not defined on these answers"
    free_text = [name for name, task in tasks.items() if task.get("free_text")]
    if free_text and ACCURACY.name in evaluation:
        yield (
            f"{', '.join(free_text)}: free text; accuracy is exact match, "
            "which counts a right answer in other words as wrong"
        )
    if evaluation.get("verdict"):
        yield f"verdict: {evaluation['verdict']}"
    for line in evaluation.get("advice", ()):
        yield f"next: {line}"


def _class_text(scores: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    """Return the metrics that were measured on a class, with labels if there are several."""
    measured = [metric for metric in metrics if scores.get(metric.name) is not None]
    values = [metric.text(scores[metric.name]) for metric in measured]
    if len(measured) > 1:
        values = [f"{metric.label} {value}" for metric, value in zip(measured, values, strict=True)]
    return f"{' / '.join(values)} of {scores['samples']:,}"


def training_line(training: Mapping[str, Any]) -> str:
    """Return a sentence about a training run, and further lines if rows of the data were left out or changed.

    training: {"steps", "seconds", "trainable_parameters", "data"?}.
    """
    lines = [
        f"trained {training['trainable_parameters']:,} parameters for {training['steps']:,} steps in "
        f"{training['seconds']:,.0f} s"
    ]
    return "\n".join([*lines, *_data_lines(training.get("data") or {})])


def _data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was skipped, dropped and shortened; a row counts each time it is read.

    data: {"rows", "skipped", "dropped", "shortened", "rewritten"?, "held_out_skipped"?}.
    """
    counts = {
        "skipped as bad": data.get("skipped"),
        "dropped as too long": data.get("dropped"),
        "shortened": data.get("shortened", {}).get("samples"),
    }
    counted = [f"{count:,} {what}" for what, count in counts.items() if count]
    if counted:
        yield f"of {data['rows']:,} rows read: {', '.join(counted)}; see left_out.jsonl"
    if data.get("rewritten"):
        yield (
            "the chat template left out or changed words of answers in "
            f"{data['rewritten']:,} of {data['rows']:,} rows"
        )
    if data.get("held_out_skipped"):
        yield f"{data['held_out_skipped']:,} held-out rows skipped as bad; see left_out.jsonl"


def merge_table(report: Mapping[str, Any]) -> Table:
    """Return a table of loss and metrics of the adapter, the merged model, and quantization alone."""
    cost = report["cost"]
    metrics = metrics_in(cost)
    asked = f", {plural(cost['answers'], 'question')} (95 % interval)"
    if report["prompts_from"] == MADE_UP:
        asked += ", the adapter's answers as reference"
    table = Table(title=f"measured on {report['prompts_from']}", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column(f"loss, {plural(cost['samples'], 'sample')}", justify="right")
    for metric in metrics:
        table.add_column(f"{metric.label}{asked}", justify="right")
    for name, loss in cost["loss"].items():
        values = (_with_interval(metric, cost, name) for metric in metrics)
        table.add_row(_MERGE_MODELS[name], f"{loss:.4f}", *values)
    return table


def _with_interval(metric: Metric, cost: Mapping[str, Any], model: str) -> str:
    """Return ``96.9 % (90.6 to 100.0)``."""
    value, interval = metric.text(cost[metric.name][model]), cost[f"{metric.name}_interval"][model]
    if not interval or interval["low"] is None:
        return value
    low, high = (metric.text(interval[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{value} ({low} to {high})"


def merge_lines(report: Mapping[str, Any]) -> str:
    """Return lines on what was verified, on the differences and their margins, and on the logits."""
    verified, cost = report["verified"], report["cost"]
    worst = (
        f"; largest error {verified['worst_error']:.2f} of what rounding allows" if verified["worst"] else ""
    )
    limits = "".join(
        f" or {metric.label} {'falls' if metric.higher_is_better else 'rises'} by more than "
        f"{_margin_text(metric, cost[f'{name}_margin'])}"
        for name, metric in METRICS.items()
        if cost.get(f"{name}_margin") is not None
    )
    merged = verified["matrices_with_lora"]
    lora = f", {merged:,} of them matrices with LoRA: W + scale * B A" if merged else ""
    return (
        f"verified {verified['tensors']:,} tensors{lora}{worst}\n"
        f"loss {cost['loss_increase']:+z.4f} (standard error {cost['loss_increase_standard_error']:.4f})"
        f"{_changes(cost)}; "
        f"rejected if, less two standard errors, the loss rises by more than {cost['margin']:.2g}{limits}\n"
        f"logits: token agreement {percent(report['token_agreement'])}, "
        f"max difference {report['relative']:.2g} relative to the largest logit, "
        f"over {report['tokens']:,} tokens"
    )


def _changes(cost: Mapping[str, Any]) -> str:
    """Return by how much the merged model's metrics differ, with the standard errors, paired by question."""
    texts = []
    for metric in metrics_in(cost):
        values = cost[metric.name]["adapter"], cost[metric.name]["merged"]
        if None not in values:
            scale, unit = (100, " points") if metric.is_fraction else (1, "")
            error = scale * cost[f"{metric.name}_drop_standard_error"]
            change = scale * (values[1] - values[0])
            texts.append(f", {metric.label} {change:+z.3g}{unit} (standard error {error:.2g})")
    return "".join(texts)


def _margin_text(metric: Metric, margin: float) -> str:
    return f"{100 * margin:.0f} points" if metric.is_fraction else metric.text(margin)
