"""The numbers at the head of a report, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ft.formatting import duration, significant

from .folder import RunFolder

MEASURES = (  # name, key in the log, how it is written
    ("loss", "loss", "{:.4g}"),
    ("held-out loss", "eval_loss", "{:.4g}"),
    ("held-out accuracy", "eval_accuracy", "{:.1%}"),
    ("reward margin", "rewards/margins", "{:.3g}"),
    ("pairs ranked rightly", "rewards/accuracies", "{:.1%}"),
    ("label tokens/s", "label_tokens_per_second", "{:,.3g}"),
    ("images/s", "images_per_second", "{:,.3g}"),
    ("memory", "memory_gib", "{:.2f} GiB"),
    ("steps left out", "skipped_steps", "{:,}"),
)


def facts(run: RunFolder) -> dict[str, str]:
    """Name -> value of what is known of a run; of what changes, the newest entry of the log."""
    trained = run.metrics.get("train", {})
    known = {"parameters trained": f"{trained['trainable_parameters']:,}"} if trained else {}
    if run.seconds is not None:
        known["training time"] = duration(run.seconds)
    for name, key, form in MEASURES:
        value = run.last(key)
        if value is not None:
            known[name] = _written(form, value)
    return known | ({"best evaluation": f"step {trained['best']['step']:,}"} if "best" in trained else {})


def accuracy_table(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracies in 0..1: {"columns": headers, "rows": {task: (samples, *accuracies)}, "all": likewise}."""
    if not evaluation:
        return None
    columns = {
        "majority answer": "majority",
        "before": "before",
        "after": "accuracy",
        "with another image": "shuffled_images",
    }
    overall = {key: key if key == "accuracy" else f"accuracy_{key}" for key in columns.values()}
    measured = {header: key for header, key in columns.items() if evaluation.get(overall[key]) is not None}
    tasks = evaluation["per_task"]
    rows = {
        name: (task["samples"], *(task.get(key) for key in measured.values())) for name, task in tasks.items()
    }
    total = sum(task["samples"] for task in tasks.values())
    return {
        "columns": [*measured],
        "rows": rows,
        "all": (total, *(evaluation[overall[key]] for key in measured.values())),
    }


def class_table(evaluation: Mapping[str, Any]) -> list[tuple[str, str, int, float, int]]:
    """Task, reference answer, samples, accuracy in 0..1 and how often it was answered, of every task of few classes."""
    return [
        (task, label, one["samples"], one["accuracy"], one["predicted"])
        for task, found in evaluation.get("per_task", {}).items()
        for label, one in (found.get("classes") or {}).items()
    ]


def _written(form: str, value: float) -> str:
    """Large numbers have no places after the point."""
    return significant(value) if form == "{:,.3g}" else form.format(value).replace("%", " %")
