"""What an evaluation found, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from flamingo_ft.formatting import percent

MOST_CLASSES = 5  # that a line holds
_ACCURACIES = (  # column, key in a task's results, key in the results over all tasks
    ("majority", "majority", "accuracy_majority"),
    ("before", "before", "accuracy_before"),
    ("after", "accuracy", "accuracy"),
    ("with another image", "shuffled_images", "accuracy_shuffled_images"),
)


def accuracy_table(evaluation: Mapping[str, Any]) -> Table:
    """One row per task and one over all of them; a column for everything that was measured.

    evaluation: {"accuracy", "accuracy_before"?, "accuracy_shuffled_images"?, "accuracy_majority"?, "per_task":
        {task: {"accuracy", "samples", "before"?, "shuffled_images"?, "majority"?}}}, accuracies in 0..1.
    """
    tasks = evaluation["per_task"]
    measured = [column for column in _ACCURACIES if evaluation.get(column[2]) is not None]
    only_after = not any(name in ("before", "with another image") for name, *_ in measured)

    table = Table(title="accuracy on held-out samples", title_justify="left")
    table.add_column("task")
    headers = ["accuracy" if only_after and name == "after" else name for name, *_ in measured]
    for header in ["samples", *headers]:
        table.add_column(header, justify="right")
    for name, task in tasks.items():
        table.add_row(name, f"{task['samples']:,}", *(percent(task.get(key)) for _, key, _ in measured))
    table.add_section()
    total = sum(task["samples"] for task in tasks.values())
    table.add_row("all", f"{total:,}", *(percent(evaluation[key]) for _, _, key in measured))
    return table


def evaluation_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What to say below the table: tasks of few classes one by one, tasks that exact match does not suit, the verdict."""
    for name, task in evaluation["per_task"].items():
        classes = task.get("classes") or {}
        if 2 <= len(classes) <= MOST_CLASSES:
            shares = (
                f"{label!r} {percent(one['accuracy'])} of {one['samples']:,}"
                for label, one in classes.items()
            )
            yield f"{name}: {', '.join(shares)}"
    free = [name for name, task in evaluation["per_task"].items() if task.get("free_text")]
    if free:
        yield f"{', '.join(free)}: free text scored by exact match, which counts a right answer in other words as wrong"
    if evaluation.get("verdict"):
        yield f"verdict: {evaluation['verdict']}"


_MERGE_ROWS = {
    "adapter": "adapter, as trained",
    "adapter_on_unquantized_base": "adapter on its base unquantized",
    "merged_before_quantization": "merged, before quantization",
    "merged": "merged",
}


def merge_table(report: Mapping[str, Any]) -> Table:
    """What `merge_adapter` returns: loss and accuracy of the merged model, of the adapter, and what quantization alone
    changes."""
    cost = report["cost"]
    table = Table(title=f"measured on {cost['samples']:,} {report['prompts_from']}", title_justify="left")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column(
        "accuracy" if cost["accuracy_margin"] is not None else "answers as the adapter", justify="right"
    )
    for name, loss in cost["loss"].items():
        table.add_row(_MERGE_ROWS[name], f"{loss:.4f}", percent(cost["accuracy"][name]))
    return table


def merge_lines(report: Mapping[str, Any]) -> str:
    """What `merge_adapter` returns, in sentences: what was verified, the margins, and how far logits are."""
    verified, cost = report["verified"], report["cost"]
    worst = (
        f"; largest error {verified['worst_error']:.2f} of what rounding allows" if verified["worst"] else ""
    )
    allowed = cost["accuracy_margin"]
    accuracy = (
        ""
        if allowed is None
        else f", or accuracy lower by more than {100 * allowed:.0f} points in the same way"
    )
    return (
        f"verified {verified['tensors']:,} tensors, {verified['matrices_with_lora']:,} of them W + scale * B A{worst}\n"
        f"loss {cost['loss_increase']:+.4f} (standard error {cost['loss_increase_standard_error']:.4f}); refused where it "
        f"is higher by more than {cost['margin']:.2g} beyond twice that{accuracy}\n"
        f"logits: token agreement {percent(report['token_agreement'])}, largest difference {report['relative']:.2g} of "
        f"the largest, on {report['tokens']:,} tokens"
    )


def training_line(training: Mapping[str, Any]) -> str:
    """training: {"steps", "seconds", "trainable_parameters", "data"?} -> one sentence, and one more where rows of the
    data were left out or shortened."""
    line = (
        f"trained {training['trainable_parameters']:,} parameters "
        f"for {training['steps']:,} steps in {training['seconds']:,.0f} s"
    )
    return line + _data_line(training.get("data") or {})


def _data_line(data: Mapping[str, Any]) -> str:
    """data: {"rows", "skipped", "dropped", "shortened", "rewritten"?, "held_out_skipped"?}, rows counted each time that
    they are looked at."""
    shortened = data.get("shortened", {}).get("samples", 0)
    counts = {
        "skipped as bad": data.get("skipped"),
        "dropped as too long": data.get("dropped"),
        "shortened": shortened,
    }
    told = [f"{count:,} {what}" for what, count in counts.items() if count]
    line = f"\nof {data['rows']:,} rows looked at {', '.join(told)}; see left_out.jsonl" if told else ""
    if data.get("rewritten"):
        rows = f"{data['rewritten']:,} of {data['rows']:,} rows"
        line += f"\nthe chat template left out or changed words of answers in {rows}"
    held_out = data.get("held_out_skipped")
    return line + (f"\n{held_out:,} held-out rows skipped as bad; see left_out.jsonl" if held_out else "")
