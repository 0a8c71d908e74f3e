"""The output directory of a run: starting a run never loses an earlier one.

Separate from resume.py so that the CLI can reject a directory before importing torch.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.config import LOG_FILE, METRICS_FILE, PROBE_FILE, RECIPE_FILE, TrainSection
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS


def prepare_output_dir(
    folder: Path, *, overwrite: bool = False, resume: bool = False, has_checkpoint: bool = False
) -> Path | None:
    """Make sure that ``folder`` exists and is empty, or holds the run to resume; calling it twice is fine.

    A probe of the tower may be in it already, and stays.

    overwrite: move an earlier run to a new folder beside it, whose path is returned. resume: keep an earlier
    run. has_checkpoint: whether there is a checkpoint to resume from, even if the rest of the run is lost.

    Raises UserError if the folder holds a run and neither flag is set, if it holds other files, or if it is a
    file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"train.output_dir: {folder} is a file; choose another with train.output_dir=FOLDER")
    moved_to = None
    if resume and (has_checkpoint or (folder / RECIPE_FILE).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        return None
    if folder.is_dir() and _has_files(folder):
        _check_replaceable(folder, overwrite)
        moved_to = _free_name(folder)
        folder.rename(moved_to)
    folder.mkdir(parents=True, exist_ok=True)
    if moved_to is not None and (moved_to / PROBE_FILE).is_file():
        shutil.copy2(moved_to / PROBE_FILE, folder)
    return moved_to


def undo_start(folder: Path, earlier: Path | None) -> bool:
    """Remove a run that failed before its first step; its folder is as before, ready for the next attempt.

    A probe of the tower stays. earlier: the run that was in ``folder``, and is moved back. Returns False, and
    removes nothing, for a run with steps.
    """
    if earlier is None and not (folder / RECIPE_FILE).is_file():
        return False
    logs = (log.stat().st_size for log in folder.rglob(LOG_FILE))
    if any(logs) or any(folder.rglob(ADAPTER_WEIGHTS)):  # every checkpoint has them, wherever it is
        return False
    for path in folder.iterdir():
        if earlier is None and path.name == PROBE_FILE:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if earlier is not None:
        folder.rmdir()
        earlier.rename(folder)
    return True


def keep_probe(probe: Path, folder: Path) -> bool:
    """Copy a recipe's probe to its output directory, where the run and its report find it.

    Returns False, and copies nothing, if ``folder`` is a file or holds files but no run.
    """
    if folder.exists() and not folder.is_dir():
        return False
    if folder.is_dir() and _has_files(folder) and not (folder / RECIPE_FILE).is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / PROBE_FILE, probe.read_text(encoding="utf-8"))
    return True


def archive_metrics(folder: Path) -> None:
    """Rename the metrics of a run that is being extended: ``metrics.json`` marks a run as finished."""
    metrics = folder / METRICS_FILE
    if metrics.is_file():
        metrics.rename(folder / f"{METRICS_FILE}.step-{finished_steps(folder)}")


def finished_steps(folder: Path) -> int | None:
    """Return the optimizer steps of the finished run in ``folder``; None without one."""
    metrics = folder / METRICS_FILE
    return json.loads(metrics.read_text(encoding="utf-8"))["train"]["steps"] if metrics.is_file() else None


def refuse_lost_run(recipe_path: Path, train_config: TrainSection) -> None:
    """Raise UserError if ``--resume`` is given the resolved recipe of a run whose folders are not found.

    They may be relative to another directory, and a new run would start without the user noticing.
    """
    folders = [train_config.output_dir, train_config.checkpoint_dir or train_config.output_dir]
    if recipe_path.name != RECIPE_FILE or train_config.push_to_hub or any(map(_has_files, folders)):
        return
    raise UserError(
        f"train.output_dir: nothing to resume in {train_config.output_dir}, although {recipe_path} is the "
        "recipe of a run; change to the directory where it was started, or set "
        f"train.output_dir={recipe_path.parent}"
    )


def _has_files(folder: Path) -> bool:
    """Return whether there is any file but a probe and leftovers of a run that was killed at its start."""
    return any(
        (path.is_file() or path.is_symlink()) and path != folder / PROBE_FILE and not atomic.is_leftover(path)
        for path in folder.rglob("*")
    )


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"train.output_dir: {folder} holds files but no run; choose another with train.output_dir=FOLDER"
        )
    if not overwrite:
        raise UserError(
            f"train.output_dir: {folder} already holds a run; resume it with --resume, move it aside with "
            "--overwrite, or choose another with train.output_dir=FOLDER"
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"train.output_dir: {folder} contains the current directory and cannot be moved aside; "
            "change to another directory, or choose another with train.output_dir=FOLDER"
        )


def _free_name(folder: Path) -> Path:
    """Return the first free name of ``runs/digits.old-1``, ``runs/digits.old-2``, ... for ``runs/digits``."""
    folder = folder.resolve()
    names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
