"""Evaluate a model on a task, as `flamingo-ft eval MODEL TASK` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.data.sample import display_text
from flamingo_ft.evaluation.metrics import Metric, Ranked
from flamingo_ft.evaluation.results_page import write_results_page
from flamingo_ft.hub import fetch_model
from flamingo_ft.inference.predictor import BATCH_SIZE, Predictor
from flamingo_ft.progress import progress_bars

from .registry import find_task
from .run import Protocol, TaskAnswers, controls_of, prepare, run_task
from .scores import metrics_of, over_seeds, task_record

RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.jsonl"


def evaluate_task(
    model: str | Path,
    task_name: str,
    data: str | Path,
    protocol: Protocol,
    *,
    shots: Sequence[int] = (0,),
    seeds: Sequence[int] = (0,),
    metrics: Sequence[str] = (),
    controls: bool = True,
    quantization: str | None = None,
    batch_size: int | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score an adapter or a merged model on a task, for each number of shots and each seed.

    data: folder of the task's published files. protocol: how it is asked; its shots and seed are replaced.
    metrics: names of more metrics. controls: ask again with other images, gray ones, and shuffled
    demonstrations, for the first seed. cache: see `prepare`. out: folder for results.json,
    predictions.jsonl and a page of answers for each number of shots. log: called with a line for each run.

    Returns ``runs``, a `task_record` each, and ``over_seeds``. Raises UserError for an unknown task or
    metric, for files that are not as published, and for images that are missing.
    """
    task = find_task(task_name)
    selected = metrics_of(task, metrics)
    task.eval_examples(task.open(data))  # wrong files should fail before the model is loaded
    predictor = Predictor.from_pretrained(
        fetch_model(model), quantization=quantization, batch_size=batch_size or BATCH_SIZE
    )
    records = []
    with progress_bars(stderr=True) as progress:
        for count in shots:
            for seed in seeds:
                own = replace(protocol, shots=count, seed=seed)
                title = f"{count} shots, seed {seed}"
                bar = progress.add_task(f"{title}, images", total=None, note="")
                asked = prepare(
                    predictor, task, data, own, cache=cache, on_batch=partial(progress.advance, bar)
                )
                conditions = controls_of(asked) if controls and seed == seeds[0] else []
                total = len(asked.examples) * (1 + len(conditions))
                progress.remove_task(bar)
                bar = progress.add_task(title, total=total, note="")
                run = run_task(
                    predictor, task, asked, own, conditions, on_batch=partial(progress.advance, bar)
                )
                records.append(task_record(run, selected))
                log(f"{title}: {_values(records[-1])}")
                if out is not None:
                    _write_predictions(out, run, first=len(records) == 1)
                    if seed == seeds[0]:
                        title = f"{model} on {task.title}, {count} shots"
                        _write_page(out, title, run, records[-1], selected)
    result = {"model": str(model), "task": task.name, "runs": records, "over_seeds": over_seeds(records)}
    if out is not None:
        atomic.write_text(out / RESULTS_FILE, json.dumps(result, indent=2) + "\n")
    return result


def _write_page(
    out: Path, title: str, run: TaskAnswers, record: dict[str, Any], metrics: Sequence[Metric]
) -> None:
    lines = [_values(record), *([record["verdict"]] if record.get("verdict") else [])]
    page = out / f"results_{run.protocol.shots}_shots.html"
    write_results_page(page, title, lines, run.questions, run.answers, metrics)


def _values(record: dict[str, Any]) -> str:
    scores = ((name, score["value"]) for name, score in record["scores"].items())
    return ", ".join(f"{name} {'undefined' if value is None else f'{value:.4g}'}" for name, value in scores)


def _write_predictions(out: Path, run: TaskAnswers, first: bool) -> None:
    """Append the answers of a run, or begin a new file with those of the first."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / PREDICTIONS_FILE).open("w" if first else "a", encoding="utf-8") as file:
        for index, question in enumerate(run.questions):
            row: dict[str, Any] = {
                "where": question.where,
                "shots": run.protocol.shots,
                "seed": run.protocol.seed,
                "category": question.task,
                "images": list(run.asked.examples[index].images),
                "prompt": display_text(question.messages[-1]),
                "references": list(question.references),
                **{name: str(answers[index]) for name, answers in run.answers.items()},
            }
            if isinstance(answer := next(iter(run.answers.values()))[index], Ranked):
                row["scores"] = dict(answer.scores)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
