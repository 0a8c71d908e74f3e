"""A run of several stages, each of which is an ordinary run in its own folder: ``1-bridge``, ``2-lora``

The folder above them gets the results of the whole (`stage_results`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from flamingo_ft import atomic, processes
from flamingo_ft.config import METRICS_FILE, PROBE_FILE, RECIPE_FILE, Recipe, dump_recipe, load_recipe
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.data.opened_data import check_method, with_max_steps
from flamingo_ft.errors import ReportedElsewhere, UserError
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.evaluation.select_metrics import select_metrics
from flamingo_ft.report import final_report

from .build import check_settings
from .checkpoint_folders import checkpoint_root, newest_checkpoint
from .hub_checkpoints import background_uploads, prepare_repository
from .interruptions import io_errors_as_user_error
from .output_dir import archive_metrics, keep_probe, prepare_output_dir
from .resume import find_start_point
from .stage_results import join_logs, write_results

Notify = Callable[[str], None]
TrainRun = Callable[[Recipe], dict[str, Any]]  # train one stage, and return its metrics


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
    if resume and processes.run_on_main(partial(_is_finished, recipe)):
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
        with _named_errors(recipe, index):
            return train_run(run)
    finally:
        gc.collect()  # hooks and their modules are reference cycles: the next stage needs the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if processes.is_main():
            join_logs(recipe)


def _ignore(line: str) -> None:
    """Log nothing: the main process does."""


@contextmanager
def _named_errors(recipe: Recipe, index: int) -> Generator[None]:
    """Begin every line of a UserError with the stage."""
    try:
        yield
    except ReportedElsewhere:
        raise
    except UserError as error:
        stage = f"stages.{index} ({recipe.stages[index].name})"
        error.args = ("\n".join(f"{stage}: {line}" for line in str(error).splitlines()),)
        raise


# --- before the first stage ---


def _checked(recipe: Recipe, notify: Notify) -> Recipe:
    """Check settings and data of every stage, and return the recipe with the length of each in steps."""
    trains = []
    for index, run in enumerate(recipe.runs):
        with processes.raise_together(), _named_errors(recipe, index):
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


def _is_finished(recipe: Recipe) -> bool:
    """Return whether the results of all stages are written. Raises UserError if other stages began there."""
    _refuse_changed_length(recipe)
    is_finished = True
    for index, run in enumerate(recipe.runs):
        with _named_errors(recipe, index):
            has_ended = (run.train.output_dir / METRICS_FILE).is_file()
            is_finished = is_finished and has_ended and find_start_point(run).finished
    metrics = recipe.train.output_dir / METRICS_FILE
    if not (is_finished and metrics.is_file()):
        return False
    written = json.loads(metrics.read_text(encoding="utf-8")).get("stages", ())
    return [stage["name"] for stage in written] == [stage.name for stage in recipe.stages]


def _refuse_changed_length(recipe: Recipe) -> None:
    """Raise UserError for a finished stage that would be extended although the next one started from it."""
    runs = recipe.runs
    for index, (run, following) in enumerate(zip(runs[:-1], runs[1:], strict=True)):
        folder = run.train.output_dir
        if not (folder / METRICS_FILE).is_file() or not _has_begun(following):
            continue
        earlier = load_recipe(folder / RECIPE_FILE, require=()).train.max_steps
        if earlier != run.train.max_steps:
            raise UserError(
                f"stages.{index} ({recipe.stages[index].name}): train.max_steps was {earlier}, is "
                f"{run.train.max_steps}, but the next stage started from its result; set it back, or choose "
                "another train.output_dir"
            )


def _has_begun(run: Recipe) -> bool:
    root = checkpoint_root(run.train)
    return (run.train.output_dir / RECIPE_FILE).is_file() or newest_checkpoint(root) is not None


def _begin(recipe: Recipe, resume: bool) -> None:
    """Prepare the run's folder and its repository, and write its recipe."""
    output_dir = recipe.train.output_dir
    prepare_output_dir(output_dir, resume=resume)
    archive_metrics(output_dir)
    atomic.write_text(output_dir / RECIPE_FILE, dump_recipe(recipe))
    if recipe.train.push_to_hub:
        prepare_repository(recipe.train.push_to_hub, starts_new_run=False)
