"""Evaluate a model on a task, as `flamingo-ft eval MODEL TASK` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.config import PREDICTIONS_FILE, RESULTS_FILE
from flamingo_ft.data.sample import display_text
from flamingo_ft.evaluation.card import check_has_card, write_comparison
from flamingo_ft.evaluation.metrics import Metric, Ranked
from flamingo_ft.evaluation.results import AFTER
from flamingo_ft.evaluation.results_page import write_results_page
from flamingo_ft.evaluation.variant_tables import variant_tables
from flamingo_ft.evaluation.variants import (
    Variant,
    VariantAnswers,
    compare_variants,
    find_variants,
    use_variant,
)
from flamingo_ft.formatting import plural
from flamingo_ft.inference.predictor import BATCH_SIZE, Predictor
from flamingo_ft.progress import Bars, progress_bars

from .registry import find_task
from .run import Asked, Protocol, TaskAnswers, controls_of, prepare, run_task
from .scores import metrics_of, over_seeds, task_record
from .task import Task

Runs = dict[Protocol, TaskAnswers]  # of one model


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
    start: str | Path | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    compare: Sequence[str] = (),
    card: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score an adapter or a merged model on a task, for each number of shots and each seed.

    data: folder of the task's published files. protocol: how it is asked; its shots and seed are replaced.
    metrics: names of more metrics. controls: ask again with other images, gray ones, and shuffled
    demonstrations, for the first seed. start, quantization, dtype: see `Predictor.from_pretrained`. cache:
    see `prepare`. out: folder for results.json, predictions.jsonl and a page of answers for each number of
    shots. compare: variants to ask the same prompts, those of the first seed; see `find_variants`. card:
    write the scores into the card (README.md) of the model. log: called with a line for each run.

    Returns ``runs``, a `task_record` each, and ``over_seeds``; for a comparison or a card also ``variants``,
    the records of `compare_variants`, each with its ``shots``. Raises UserError for an unknown task or
    metric, for files that are not as published, for images that are missing, and for variants that cannot be
    loaded.
    """
    task = find_task(task_name)
    selected = metrics_of(task, metrics)
    if card:
        check_has_card(model)
    variants = find_variants(model, quantization, compare, start)
    task.eval_examples(task.open(data))  # wrong files should fail before the model is loaded
    every = (replace(protocol, shots=count, seed=seed) for count in shots for seed in seeds)
    protocols = list(dict.fromkeys(every))
    compared = [each for each in protocols if each.seed == seeds[0]]
    runs: dict[Variant, Runs] = {}
    with progress_bars(stderr=True) as progress:
        runner = _Runner(task, data, selected, compared if controls else (), cache, out, log, progress)
        for variant in variants:
            ask = partial(runner.ask, variant.name, compared if runs else protocols)
            runs[variant] = use_variant(variant, ask, batch_size=batch_size or BATCH_SIZE, dtype=dtype)
    records = [task_record(run, selected) for run in runs[variants[0]].values()]
    result = {"model": str(model), "task": task.name, "runs": records, "over_seeds": over_seeds(records)}
    if compare or card:
        result["variants"] = [
            {"shots": each.shots, **record} for each in compared for record in _compare(runs, each, selected)
        ]
    if out is not None:
        for each in compared:
            _write_page(out, str(model), result, each, runs, selected)
        atomic.write_text(out / RESULTS_FILE, json.dumps(result, indent=2) + "\n")
    if card:
        for each in compared:
            write_comparison(variants[0].folder, _describe(task, each), of_shots(result, each.shots))
    return result


def of_shots(result: Mapping[str, Any], shots: int) -> list[dict[str, Any]]:
    """Return the records of variants in what `evaluate_task` returns, of one number of shots."""
    return [record for record in result.get("variants", ()) if record["shots"] == shots]


@dataclass
class _Runner:
    """Asks one model after the other the same prompts.

    with_controls: the protocols with controls. asked: the examples as prepared for the first model: another
    tower could find other demonstrations.
    """

    task: Task
    data: str | Path
    metrics: Sequence[Metric]
    with_controls: Sequence[Protocol]
    cache: Path | None
    out: Path | None
    log: Callable[[str], None]
    progress: Bars
    asked: dict[Protocol, Asked] = field(default_factory=dict)
    has_written: bool = False

    def ask(self, name: str, protocols: Sequence[Protocol], predictor: Predictor) -> Runs:
        """Return the runs of a model, and write the answers of each as it ends."""
        runs = {}
        for protocol in protocols:
            title = f"{name}, {protocol.shots} shots, seed {protocol.seed}"
            run = runs[protocol] = self._run(title, protocol, predictor)
            self.log(f"{title}: {_values(run, self.metrics)}")
            if self.out is not None:
                _write_predictions(self.out, name, run, append=self.has_written)
                self.has_written = True
        return runs

    def _run(self, title: str, protocol: Protocol, predictor: Predictor) -> TaskAnswers:
        if protocol not in self.asked:
            bar = self.progress.add_task(f"{title}, images", total=None, note="")
            on_batch = partial(self.progress.advance, bar)
            self.asked[protocol] = prepare(
                predictor, self.task, self.data, protocol, cache=self.cache, on_batch=on_batch
            )
            self.progress.remove_task(bar)
        asked = self.asked[protocol]
        conditions = controls_of(asked) if protocol in self.with_controls else []
        bar = self.progress.add_task(title, total=len(asked.examples) * (1 + len(conditions)), note="")
        return run_task(
            predictor, self.task, asked, protocol, conditions, on_batch=partial(self.progress.advance, bar)
        )


def _compare(
    runs: Mapping[Variant, Runs], protocol: Protocol, metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    answered = [
        VariantAnswers(
            variant.name, own[protocol].answers, own[protocol].samples_per_second, variant.quantization
        )
        for variant, own in runs.items()
    ]
    questions = next(iter(runs.values()))[protocol].questions
    return compare_variants(questions, answered, metrics)


def _describe(task: Task, protocol: Protocol) -> str:
    """Return the task and how it is asked: ``VQAv2, 4 shots, nearest demonstrations``."""
    demonstrations = ["nearest demonstrations"] if protocol.choice == "rices" else []
    turns = ["in turns of a chat"] if protocol.form == "chat" else []
    return ", ".join([task.title, plural(protocol.shots, "shot"), *demonstrations, *turns])


def _write_page(
    out: Path,
    model: str,
    result: Mapping[str, Any],
    protocol: Protocol,
    runs: Mapping[Variant, Runs],
    metrics: Sequence[Metric],
) -> None:
    """Write the page of one number of shots."""
    own, *others = (by_protocol[protocol] for by_protocol in runs.values())
    (record,) = (
        each for each in result["runs"] if (each["shots"], each["seed"]) == (protocol.shots, protocol.seed)
    )
    write_results_page(
        out / f"results_{protocol.shots}_shots.html",
        f"{model} on {own.task.title}, {protocol.shots} shots",
        [_values(own, metrics), *filter(None, [record.get("verdict")])],
        own.questions,
        own.answers,
        metrics,
        tables=variant_tables(of_shots(result, protocol.shots)),
        variants={
            variant.name: run.answers[AFTER] for variant, run in zip(list(runs)[1:], others, strict=True)
        },
    )


def _values(run: TaskAnswers, metrics: Sequence[Metric]) -> str:
    values = {metric.name: metric.evaluate(run.questions, run.answers[AFTER]) for metric in metrics}
    return ", ".join(
        f"{name} {'undefined' if value is None else f'{value:.4g}'}" for name, value in values.items()
    )


def _write_predictions(out: Path, model: str, run: TaskAnswers, append: bool) -> None:
    """Append the answers of a run, or begin a new file with them."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / PREDICTIONS_FILE).open("a" if append else "w", encoding="utf-8") as file:
        for index, question in enumerate(run.questions):
            row: dict[str, Any] = {
                "where": question.where,
                "model": model,
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
