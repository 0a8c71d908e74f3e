"""The scores of a task as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from flamingo_ft.cli.output import titled_table
from flamingo_ft.evaluation.metrics import Metric, find_metrics
from flamingo_ft.evaluation.tasks.run import CONTROLS


def print_task(record: Mapping[str, Any]) -> None:
    """Print what `evaluate_task` returns."""
    for table in task_tables(record):
        Console().print(table)
    for line in task_lines(record):
        typer.echo(line)


def task_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return a table for each metric, with a row for each number of shots."""
    return [_table(record, metric) for metric in find_metrics(record["runs"][0]["scores"])]


def _table(record: Mapping[str, Any], metric: Metric) -> Table:
    first_runs = {run["shots"]: run for run in reversed(record["runs"])}
    conditions = [
        name for name in CONTROLS if any(name in _controls(run, metric) for run in first_runs.values())
    ]
    table = titled_table(f"{record['task']}: {metric.label}")
    seeds = len({run["seed"] for run in record["runs"]})
    value = "value (95 % interval)" if seeds == 1 else f"mean ± deviation of {seeds} seeds"
    for header in ("shots", "examples", value, *(CONTROLS[name] for name in conditions), "examples/s"):
        table.add_column(header, justify="right")
    for summary in record["over_seeds"]:
        if summary["metric"] == metric.name:
            run = first_runs[summary["shots"]]
            controls = _controls(run, metric)
            cells = [metric.text(controls[name]["value"]) if name in controls else "" for name in conditions]
            speed = f"{run['samples_per_second']:.1f}"
            row = (str(summary["shots"]), f"{run['samples']:,}", _value(summary, run, metric), *cells, speed)
            table.add_row(*row)
    return table


def _controls(run: Mapping[str, Any], metric: Metric) -> Mapping[str, Any]:
    return run["scores"][metric.name].get("controls", {})


def _value(summary: Mapping[str, Any], run: Mapping[str, Any], metric: Metric) -> str:
    if summary["mean"] is None:
        return "not defined"
    if len(summary["seeds"]) > 1:
        return f"{metric.text(summary['mean'])} ± {metric.text(summary['deviation'])}"
    score = run["scores"][metric.name]
    return f"{metric.text(score['value'])} ({metric.text(score['low'])} to {metric.text(score['high'])})"


def task_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the lines below the tables: parts, the publisher's other figures, and the verdict."""
    lines = []
    for run in record["runs"]:
        where = f"{run['shots']} shots, seed {run['seed']}"
        for name, values in run.get("by_category", {}).items():
            scores = ", ".join(
                f"{metric.label} {metric.text(values[metric.name]) or 'not defined'}"
                for metric in find_metrics(run["scores"])
            )
            lines.append(f"{where}, {name} ({values['samples']:,}): {scores}")
        lines += [f"{where}, {name}: {value:.4g}" for name, value in run.get("further", {}).items()]
        if run.get("verdict"):
            lines.append(f"{where}: {run['verdict']}")
    return lines
