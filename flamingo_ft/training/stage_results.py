"""The results of a run of several stages, in its folder: adapter, log, predictions, card and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.adapters import write_card
from flamingo_ft.adapters.join import write_joined_adapter
from flamingo_ft.config import LOG_FILE, METRICS_FILE, PREDICTIONS_FILE, Recipe, StageSection
from flamingo_ft.config.tables import BRIDGE_PARTS, LORA_PARTS
from flamingo_ft.data.examples import total_metrics
from flamingo_ft.evaluation.results import BEFORE, card_tables, load_predictions, with_scores_before
from flamingo_ft.evaluation.run_tables import run_tables
from flamingo_ft.model.parts import in_parts, is_lora
from flamingo_ft.report.run_folder import read_log, write_log

from .non_finite import SKIPPED

LEFT_OUT_FILE = "left_out.jsonl"


def write_results(recipe: Recipe, stage_metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the results of a run whose stages are all finished, ``metrics.json`` last; return its content."""
    output_dir, folders = recipe.train.output_dir, [run.train.output_dir for run in recipe.runs]
    sizes = write_joined_adapter(folders, output_dir)
    metrics = _joined_metrics(recipe, stage_metrics, sizes)
    _join_left_out(recipe)
    scores, others = card_tables(metrics.get("eval")), run_tables(metrics)
    write_card(output_dir, metrics, tables=scores, run_tables=others)
    atomic.write_text(output_dir / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    return metrics


def join_logs(recipe: Recipe) -> None:
    """Write the log of the stages so far, on one axis of steps; ``stage`` is the number of each entry's."""
    entries, steps, seconds = [], 0, 0.0
    for number, run in enumerate(recipe.runs, start=1):
        if not (run.train.output_dir / LOG_FILE).is_file():
            break
        own = read_log(run.train.output_dir)
        for entry in own:
            time = {"seconds": round(entry["seconds"] + seconds, 1)} if "seconds" in entry else {}
            entries.append({**entry, **time, "step": entry["step"] + steps, "stage": number})
        steps += max((entry["step"] for entry in own), default=0)
        seconds += max((entry.get("seconds", 0.0) for entry in own), default=0.0)
    write_log(recipe.train.output_dir, entries)


def _joined_metrics(
    recipe: Recipe, stages: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the last stage's metrics with the scores before the first stage, and totals of training."""
    metrics: dict[str, Any] = {}
    if "eval" in stages[-1]:
        metrics["eval"] = _join_predictions(recipe, stages)
    trainings = [stage["train"] for stage in stages]
    metrics["train"] = {
        "steps": sum(training["steps"] for training in trainings),
        "seconds": round(sum(training["seconds"] for training in trainings), 1),
        "trainable_parameters": _count_trained(recipe, sizes),
        "data": total_metrics([training["data"] for training in trainings]),
    }
    if skipped := sum(training.get(SKIPPED, 0) for training in trainings):
        metrics["train"][SKIPPED] = skipped
    named = zip(recipe.stages, stages, strict=True)
    metrics["stages"] = [{"name": stage.name, "trained": trained_parts(stage), **own} for stage, own in named]
    return metrics


def trained_parts(stage: StageSection) -> list[str]:
    """Return labels of what a stage trains."""
    whole = [part.short for part in BRIDGE_PARTS if getattr(stage.trainable, part.name)]
    if len(whole) == len(BRIDGE_PARTS):
        whole = ["bridge"]
    return whole + [f"LoRA on {part.short}" for part in LORA_PARTS if part.name in stage.lora.parts]


def _count_trained(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Count the parameters that any stage trains, in the joined adapter."""
    whole = {
        part.name for part in BRIDGE_PARTS for stage in recipe.stages if getattr(stage.trainable, part.name)
    }
    return sum(size for name, size in sizes.items() if is_lora(name) or in_parts(name, whole))


def _join_predictions(recipe: Recipe, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the last stage's predictions and return its scores, both with those from before the first stage.

    Those are left out if the first stage was evaluated on other questions.
    """
    first, *_, last = (run.train.output_dir for run in (recipe.runs[0], *recipe.runs))
    earlier, rows = load_predictions(first), load_predictions(last)
    same = [row["where"] for row in earlier] == [row["where"] for row in rows]
    if same and all(BEFORE in row for row in earlier):
        rows = [{**row, BEFORE: before[BEFORE]} for row, before in zip(rows, earlier, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write_text(recipe.train.output_dir / PREDICTIONS_FILE, lines)
    return with_scores_before(stages[-1]["eval"], stages[0].get("eval") or {}) if same else stages[-1]["eval"]


def _join_left_out(recipe: Recipe) -> None:
    """Write the rows that any stage left out, each once."""
    files = [run.train.output_dir / LEFT_OUT_FILE for run in recipe.runs]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    lines = dict.fromkeys(line for text in texts for line in text.splitlines(keepends=True))
    if lines:
        atomic.write_text(recipe.train.output_dir / LEFT_OUT_FILE, "".join(lines))
