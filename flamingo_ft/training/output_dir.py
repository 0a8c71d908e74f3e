"""The folder a run is written to. An earlier run is never lost by starting another."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.config import METRICS_FILE, RECIPE_FILE, TrainSection
from flamingo_ft.errors import UserError


def prepare_output_dir(
    folder: Path, *, overwrite: bool = False, resume: bool = False, has_checkpoint: bool = False
) -> Path | None:
    """Make sure that `folder` is there and without files, or holds a run to go on with.

    overwrite: an earlier run in it is moved to a folder of its own beside it, whose path is returned.
    resume: an earlier run in it stays; has_checkpoint: or what there is of one, which is a checkpoint.

    Raises UserError when the folder holds a run and `overwrite` is not given, when it holds anything else,
    and when a file is in the way. A folder that is there and holds no file is fine, so preparing twice is too.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"train.output_dir: {folder} is a file; choose another: train.output_dir=FOLDER")
    earlier = None
    if resume and (has_checkpoint or (folder / RECIPE_FILE).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        return None
    if folder.is_dir() and _holds_something(folder):
        _check_replaceable(folder, overwrite)
        earlier = _free_name_beside(folder)
        folder.rename(earlier)
    folder.mkdir(parents=True, exist_ok=True)
    return earlier


def keep_earlier_metrics(folder: Path) -> None:
    """Rename the metrics of a finished run that is extended: a folder with `METRICS_FILE` counts as finished."""
    metrics = folder / METRICS_FILE
    if metrics.is_file():
        metrics.rename(folder / f"{METRICS_FILE}.step-{finished_steps(folder)}")


def finished_steps(folder: Path) -> int | None:
    """Optimizer steps of the finished run in ``folder``; None where there is no finished run."""
    metrics = folder / METRICS_FILE
    return json.loads(metrics.read_text(encoding="utf-8"))["train"]["steps"] if metrics.is_file() else None


def refuse_elsewhere(recipe: Path, train: TrainSection) -> None:
    """Refuse, with a UserError, to begin anew with the recipe of a run that is to go on, where its folders are not those
    that ``train`` names: they may be relative to another directory."""
    places = [train.output_dir, train.checkpoint_dir or train.output_dir]
    if recipe.name != RECIPE_FILE or train.push_to_hub or any(_holds_something(place) for place in places):
        return
    raise UserError(
        f"train.output_dir: found nothing to go on with in {train.output_dir}, though {recipe} is the recipe of a run; "
        f"change to the directory that it was started in, or set train.output_dir={recipe.parent}"
    )


def _holds_something(folder: Path) -> bool:
    """Any file; empty folders and half written files are what a run leaves that was killed before it began."""
    return any(
        (path.is_file() or path.is_symlink()) and not atomic.is_leftover(path) for path in folder.rglob("*")
    )


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"train.output_dir: {folder} holds files but no run; choose another: train.output_dir=FOLDER"
        )
    if not overwrite:
        raise UserError(
            f"train.output_dir: {folder} already holds a run; "
            "go on with it with --resume, move it aside with --overwrite, or choose another with train.output_dir=FOLDER"
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"train.output_dir: {folder} is or holds the current directory and cannot be moved aside; "
            "change to another, or choose train.output_dir=FOLDER"
        )


def _free_name_beside(folder: Path) -> Path:
    """`runs/digits` -> `runs/digits.old-1`, or the first such name that is free."""
    folder = folder.resolve()
    names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
