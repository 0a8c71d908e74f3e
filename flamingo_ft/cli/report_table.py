"""What an evaluation found, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from flamingo_ft.evaluation.merge_quality import MADE_UP
from flamingo_ft.evaluation.metrics import METRICS, Metric
from flamingo_ft.evaluation.results import AFTER, BEFORE, MAJORITY, SHUFFLED, ScoreTable, score_tables
from flamingo_ft.formatting import percent

MOST_CLASSES = 5  # that a line holds
_COLUMNS = {MAJORITY: "majority", BEFORE: "before", AFTER: "after", SHUFFLED: "with another image"}


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Return a table per metric in the ``eval`` record of a metrics.json: a row per task and one over all of them."""
    return [_evaluation_table(scores) for scores in score_tables(evaluation)]


def _evaluation_table(scores: ScoreTable) -> Table:
    metric = scores.metric
    headers = [_COLUMNS[column] for column in scores.columns]
    if not {BEFORE, SHUFFLED} & {*scores.columns}:
        headers = [metric.label if header == "after" else header for header in headers]
    table = Table(title=f"{metric.label} on held-out samples", title_justify="left")
    table.add_column("task")
    for header in ["samples", *headers]:
        table.add_column(header, justify="right")
    for name, row in scores.tasks.items():
        table.add_row(name, f"{row.samples:,}", *map(metric.text, row.values))
    table.add_section()
    table.add_row("all", f"{scores.overall.samples:,}", *map(metric.text, scores.overall.values))
    return table


def evaluation_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What to say below the table: tasks of few classes one by one, tasks that exact match does not suit, the verdict."""
    for name, task in evaluation["per_task"].items():
        classes = task.get("classes") or {}
        if 2 <= len(classes) <= MOST_CLASSES:
            scores = (
                f"{answer!r} {' / '.join(m.text(one.get(m.name)) for m in METRICS.values())} of {one['samples']:,}"
                for answer, one in classes.items()
            )
            yield f"{name}: {', '.join(scores)}"
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
    reference = ", the adapter's answers as reference" if report["prompts_from"] == MADE_UP else ""
    metrics = [metric for name, metric in METRICS.items() if name in cost]
    for metric in metrics:
        table.add_column(f"{metric.label}{reference}", justify="right")
    for name, loss in cost["loss"].items():
        table.add_row(_MERGE_ROWS[name], f"{loss:.4f}", *(m.text(cost[m.name][name]) for m in metrics))
    return table


def merge_lines(report: Mapping[str, Any]) -> str:
    """What `merge_adapter` returns, in sentences: what was verified, the margins, and how far logits are."""
    verified, cost = report["verified"], report["cost"]
    worst = (
        f"; largest error {verified['worst_error']:.2f} of what rounding allows" if verified["worst"] else ""
    )
    limits = "".join(
        f", or {metric.label} {'lower' if metric.higher_is_better else 'higher'} by more than "
        f"{_points(metric, cost[f'{name}_margin'])} in the same way"
        for name, metric in METRICS.items()
        if cost.get(f"{name}_margin") is not None
    )
    return (
        f"verified {verified['tensors']:,} tensors, {verified['matrices_with_lora']:,} of them W + scale * B A{worst}\n"
        f"loss {cost['loss_increase']:+.4f} (standard error {cost['loss_increase_standard_error']:.4f}); refused where it "
        f"is higher by more than {cost['margin']:.2g} beyond twice that{limits}\n"
        f"logits: token agreement {percent(report['token_agreement'])}, largest difference {report['relative']:.2g} of "
        f"the largest, on {report['tokens']:,} tokens"
    )


def _points(metric: Metric, margin: float) -> str:
    return f"{100 * margin:.0f} points" if metric.is_fraction else metric.text(margin)


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
