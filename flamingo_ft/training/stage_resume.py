"""Where a run of stages resumes: whether it is finished, and which changes to it are refused.

Nothing is written here, so that a refused command leaves everything as it was.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flamingo_ft.config import METRICS_FILE, RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.errors import ReportedElsewhere, UserError

from .checkpoint_folders import checkpoint_root, newest_checkpoint, read_manifest
from .resume import check_resumable, has_nothing_left


@dataclass(frozen=True)
class FinishedStage:
    """A stage of a finished run. recipe: what it was trained with. steps: its optimizer steps."""

    recipe: Recipe
    steps: int


def is_finished(recipe: Recipe) -> bool:
    """Return whether the results of all stages are written; their folders may have been deleted since.

    Raises UserError, with the stage, for a run of another recipe, a changed length of a stage that another
    one started from, and a stage whose result is gone although it is needed.
    """
    finished = _finished_stages(recipe)
    _refuse_changed_length(recipe, finished)
    is_whole = len(finished) == len(recipe.stages)
    for index, run in enumerate(recipe.runs):
        with named_errors(recipe, index):
            check_resumable(run)
            if index < len(finished):
                earlier, folder = finished[index], recipe.train.output_dir
                is_whole &= has_nothing_left(run, earlier.recipe, earlier.steps, folder)
    if not is_whole:
        _refuse_lost_stages(recipe, finished)
    return is_whole


@contextmanager
def named_errors(recipe: Recipe, index: int) -> Generator[None]:
    """Begin every line of a UserError with the stage."""
    try:
        yield
    except ReportedElsewhere:
        raise
    except UserError as error:
        error.args = ("\n".join(f"{_name(recipe, index)}: {line}" for line in str(error).splitlines()),)
        raise


def _name(recipe: Recipe, index: int) -> str:
    return f"stages.{index} ({recipe.stages[index].name})"


def _finished_stages(recipe: Recipe) -> list[FinishedStage]:
    """Return the stages of the finished run in the output folder; none if there is no finished one.

    Raises UserError if it is a run without stages, or a finished one of stages that the recipe lacks.
    """
    output_dir = recipe.train.output_dir
    if not (output_dir / RECIPE_FILE).is_file():
        return []
    whole = load_recipe(output_dir / RECIPE_FILE, require=())
    if not whole.stages:
        raise UserError(f"{output_dir}: holds a run without stages; choose another train.output_dir")
    if not (output_dir / METRICS_FILE).is_file():
        return []
    names, current = ([stage.name for stage in one.stages] for one in (whole, recipe))
    if current[: len(names)] != names:
        raise UserError(
            f"{output_dir}: a finished run of the stages {', '.join(names)}, got {', '.join(current)}; only "
            "add stages at the end, or choose another train.output_dir"
        )
    metrics = json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    steps = [stage["train"]["steps"] for stage in metrics["stages"]]
    return [FinishedStage(run, done) for run, done in zip(whole.runs, steps, strict=True)]


def _refuse_changed_length(recipe: Recipe, finished: Sequence[FinishedStage]) -> None:
    """Raise UserError for a finished stage of another length although the next one started from it."""
    for index, (run, following) in enumerate(zip(recipe.runs[:-1], recipe.runs[1:], strict=True)):
        folder = run.train.output_dir
        if _is_done(run):
            earlier = load_recipe(folder / RECIPE_FILE, require=())
        elif index < len(finished):
            earlier = finished[index].recipe
        else:
            continue
        is_needed = index + 1 < len(finished) or _has_begun(following)
        if is_needed and earlier.train.max_steps != run.train.max_steps:
            raise UserError(
                f"{_name(recipe, index)}: train.max_steps was {earlier.train.max_steps}, is "
                f"{run.train.max_steps}, but the next stage started from its result; set it back, or choose "
                "another train.output_dir"
            )


def _refuse_lost_stages(recipe: Recipe, finished: Sequence[FinishedStage]) -> None:
    """Raise UserError for a stage whose result is gone: training it again would give another one.

    The last checkpoint of a stage has its result too; a later stage compares it with what it started from.
    """
    runs = recipe.runs
    for index, run in enumerate(runs):
        later = runs[index + 1 :]
        is_needed = index < len(finished) or any(map(_has_begun, later))
        if _is_done(run) or not is_needed:
            continue
        if index >= len(finished) and not any(map(_is_done, later)) and _has_last_checkpoint(run):
            continue
        user = "the finished run" if index < len(finished) else "a later stage"
        raise UserError(
            f"{_name(recipe, index)}: {run.train.output_dir} holds no finished stage, although {user} was "
            "made from it; restore that folder, or choose another train.output_dir"
        )


def _is_done(run: Recipe) -> bool:
    return (run.train.output_dir / METRICS_FILE).is_file()


def _has_begun(run: Recipe) -> bool:
    root = checkpoint_root(run.train)
    return (run.train.output_dir / RECIPE_FILE).is_file() or newest_checkpoint(root) is not None


def _has_last_checkpoint(run: Recipe) -> bool:
    newest = newest_checkpoint(checkpoint_root(run.train))
    return newest is not None and read_manifest(newest)["ended"]
