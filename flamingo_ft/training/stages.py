"""A run of several stages, each of which is an ordinary run in its own folder: ``1-bridge``, ``2-lora``

The folder above them gets the results of the whole (`stage_results`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flamingo_ft import atomic, processes
from flamingo_ft.config import METRICS_FILE, PROBE_FILE, RECIPE_FILE, Recipe, dump_recipe
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.data.opened_data import check_method, with_max_steps
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.evaluation.select_metrics import select_metrics
from flamingo_ft.report import final_report

from .build import check_settings
from .hub_checkpoints import background_uploads, prepare_repository
from .interruptions import io_errors_as_user_error
from .output_dir import archive_metrics, keep_probe, prepare_output_dir
from .stage_results import join_logs, write_results
from .stage_resume import is_finished, named_errors

Notify = Callable[[str], None]
# Trains one stage and returns its metrics; the function is called right before the stage begins or resumes.
TrainRun = Callable[[Recipe, Callable[[], None]], dict[str, Any]]


def train_stages(recipe: Recipe, train_run: TrainRun, *, resume: bool, notify: Notify) -> dict[str, Any]:
    """Train every stage of the recipe, or what is left of them, and write the results of the whole.

    Returns what is written to ``metrics.json``: that of the last stage, with the scores before the first one,
    and the metrics of every stage. Raises UserError, with the stage, for everything that an ordinary run
    raises it for; settings, data and machine are checked for all stages before the first one.
    """
    if not processes.is_main():
        notify = _ignore
    recipe = _checked(recipe, notify)
    output_dir = recipe.train.output_dir
    if resume and processes.run_on_main(partial(is_finished, recipe)):
        notify(
            f"{output_dir}: all stages are finished, nothing left to do; to extend the last, raise its length"
        )
        return json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    processes.run_on_main(partial(_begin, recipe, resume))
    train_config = recipe.train
    with background_uploads(train_config.push_to_hub, train_config.save_total_limit, notify) as uploads:
        with final_report(output_dir):
            metrics = [_train_stage(recipe, index, train_run, notify) for index in range(len(recipe.stages))]
            with io_errors_as_user_error(train_config):
                processes.run_on_main(partial(_write_recipe, recipe))
                results = processes.run_on_main(partial(write_results, recipe, metrics))
        if uploads is not None:
            uploads.push_run(output_dir)
    return results


def _train_stage(recipe: Recipe, index: int, train_run: TrainRun, notify: Notify) -> dict[str, Any]:
    run, stage = recipe.runs[index], recipe.stages[index]
    notify(f"stage {index + 1} of {len(recipe.stages)}, {stage.name}: {run.train.output_dir}")
    if processes.is_main():
        probe = recipe.train.output_dir / PROBE_FILE
        if probe.is_file():
            keep_probe(probe, run.train.output_dir)
    try:
        with named_errors(recipe, index):
            return train_run(run, partial(_write_recipe, recipe))
    finally:
        gc.collect()  # hooks and their modules are reference cycles: the next stage needs the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if processes.is_main():
            join_logs(recipe)


def _ignore(line: str) -> None:
    """Log nothing: the main process does."""


# --- before the first stage ---


def _checked(recipe: Recipe, notify: Notify) -> Recipe:
    """Check settings and data of every stage, and return the recipe with the length of each in steps."""
    trains = []
    for index, run in enumerate(recipe.runs):
        with processes.raise_together(), named_errors(recipe, index):
            check_settings(run)
            trains.append(with_max_steps(run, _checked_data(run)).train)
        if run.train.epochs is not None:
            steps = f"{run.train.epochs:g} epochs are {trains[-1].max_steps:,} optimizer steps"
            notify(f"stages.{index} ({recipe.stages[index].name}): {steps}")
    stages = [
        stage.model_copy(update={"train": train}) for stage, train in zip(recipe.stages, trains, strict=True)
    ]
    last = recipe.train.model_copy(update={"max_steps": trains[-1].max_steps, "epochs": None})
    return recipe.model_copy(update={"train": last, "stages": tuple(stages)})


def _checked_data(run: Recipe) -> OpenedData:
    """Open a stage's data; read its rows, open its held-out images and try its metrics on an answer."""
    data = open_data(run.data, run.train.seed)
    check_method(data.train, run.train.method)
    data.validate_rows()
    select_metrics(run.eval, questions_of(data.eval_samples(run.eval.max_samples)))
    return data


def _begin(recipe: Recipe, resume: bool) -> None:
    """Prepare the run's folder and its repository; write the recipe of a new run."""
    output_dir = recipe.train.output_dir
    prepare_output_dir(output_dir, resume=resume)
    if not (output_dir / RECIPE_FILE).is_file():
        _write_recipe(recipe)
    if recipe.train.push_to_hub:
        prepare_repository(recipe.train.push_to_hub, starts_new_run=False)


def _write_recipe(recipe: Recipe) -> None:
    """Write the recipe, and rename the results of the run that this one extends."""
    archive_metrics(recipe.train.output_dir)
    atomic.write_text(recipe.train.output_dir / RECIPE_FILE, dump_recipe(recipe))
