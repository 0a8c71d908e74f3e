"""The results of `train`, `eval` and `merge`, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from flamingo_ft.formatting import percent

MAX_CLASSES = 5  # of a task whose classes are listed one by one
_ACCURACIES = (  # column, key in a task's results, key in the results over all tasks
    ("majority", "majority", "accuracy_majority"),
    ("before", "before", "accuracy_before"),
    ("after", "accuracy", "accuracy"),
    ("with another image", "shuffled_images", "accuracy_shuffled_images"),
)
_MERGE_MODELS = {
    "adapter": "adapter, as trained",
    "adapter_on_unquantized_base": "adapter on its unquantized base",
    "merged_before_quantization": "merged, before quantization",
    "merged": "merged",
}


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the metrics of a run or an evaluation (metrics.json)."""
    if metrics.get("eval"):
        Console().print(accuracy_table(metrics["eval"]))
        for line in evaluation_lines(metrics["eval"]):
            typer.echo(line)
    if metrics.get("train"):
        typer.echo(training_line(metrics["train"]))


def print_merge_report(report: Mapping[str, Any]) -> None:
    """Print what `merge_adapter` returns."""
    Console().print(merge_table(report))
    typer.echo(merge_lines(report))


def accuracy_table(evaluation: Mapping[str, Any]) -> Table:
    """Return a table with a row per task and one over all tasks, and a column for each accuracy that was
    measured.

    evaluation: {"accuracy", "accuracy_before"?, "accuracy_shuffled_images"?, "accuracy_majority"?,
        "per_task": {task: {"accuracy", "samples", "before"?, "shuffled_images"?, "majority"?}}}, accuracies
        in 0..1.
    """
    tasks = evaluation["per_task"]
    measured = [column for column in _ACCURACIES if evaluation.get(column[2]) is not None]
    is_only_after = not any(name in ("before", "with another image") for name, *_ in measured)

    table = Table(title="accuracy on held-out samples", title_justify="left")
    table.add_column("task")
    headers = ["accuracy" if is_only_after and name == "after" else name for name, *_ in measured]
    for header in ["samples", *headers]:
        table.add_column(header, justify="right")
    for name, task in tasks.items():
        table.add_row(name, f"{task['samples']:,}", *(percent(task.get(key)) for _, key, _ in measured))
    table.add_section()
    total = sum(task["samples"] for task in tasks.values())
    table.add_row("all", f"{total:,}", *(percent(evaluation[key]) for _, _, key in measured))
    return table


def evaluation_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines below the table: tasks with few classes by class, tasks of free text, and the
    verdict."""
    for name, task in evaluation["per_task"].items():
        classes = task.get("classes") or {}
        if 2 <= len(classes) <= MAX_CLASSES:
            accuracies = (
                f"{label!r} {percent(one['accuracy'])} of {one['samples']:,}"
                for label, one in classes.items()
            )
            yield f"{name}: {', '.join(accuracies)}"
    free_text = [name for name, task in evaluation["per_task"].items() if task.get("free_text")]
    if free_text:
        yield (
            f"{', '.join(free_text)}: free text scored by exact match, "
            "which counts a right answer in other words as wrong"
        )
    if evaluation.get("verdict"):
        yield f"verdict: {evaluation['verdict']}"


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
    """data: {"rows", "skipped", "dropped", "shortened", "rewritten"?, "held_out_skipped"?}; a row counts each
    time it is read."""
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
    """Return a table of loss and accuracy of the adapter and the merged model, and of what quantization alone
    changes."""
    cost = report["cost"]
    table = Table(title=f"measured on {cost['samples']:,} {report['prompts_from']}", title_justify="left")
    table.add_column("model")
    table.add_column("loss", justify="right")
    has_references = cost["accuracy_margin"] is not None
    table.add_column("accuracy" if has_references else "same answers as the adapter", justify="right")
    for name, loss in cost["loss"].items():
        table.add_row(_MERGE_MODELS[name], f"{loss:.4f}", percent(cost["accuracy"][name]))
    return table


def merge_lines(report: Mapping[str, Any]) -> str:
    """Return lines on what was verified, on the margins, and on the difference of logits."""
    verified, cost = report["verified"], report["cost"]
    worst = (
        f"; largest error {verified['worst_error']:.2f} of what rounding allows" if verified["worst"] else ""
    )
    accuracy = ""
    if cost["accuracy_margin"] is not None:
        points = f"{100 * cost['accuracy_margin']:.0f} points"
        accuracy = f", or if accuracy is lower by more than {points} in the same way"
    return (
        f"verified {verified['tensors']:,} tensors, "
        f"{verified['matrices_with_lora']:,} of them W + scale * B A{worst}\n"
        f"loss {cost['loss_increase']:+.4f} (standard error {cost['loss_increase_standard_error']:.4f}); "
        f"refused if it is higher by more than {cost['margin']:.2g} beyond twice that{accuracy}\n"
        f"logits: token agreement {percent(report['token_agreement'])}, "
        f"largest difference {report['relative']:.2g} of the largest, on {report['tokens']:,} tokens"
    )
