"""Where a run starts: from its newest undamaged checkpoint, if the recipe is the same, or from step 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model, hub_name, pinned_name

from .checkpoint_folders import (
    checkpoint_root,
    latest_valid,
    newest_checkpoint,
    quarantine_newer,
    read_manifest,
)
from .hub_checkpoints import fetch_newer_checkpoint
from .output_dir import finished_steps

# Keys that may change when a run is resumed: its length, where it is stored and logged, how fast data load,
# and what is measured.
CHANGEABLE_KEYS = {
    "train.max_steps",
    "train.epochs",
    "train.output_dir",
    "train.checkpoint_dir",
    "train.push_to_hub",
    "train.save_steps",
    "train.save_total_limit",
    "train.logging_steps",
    "train.report_to",
    "train.num_workers",
    "eval.batch_size",
    "eval.metrics",
    "eval.keep",
}


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    checkpoint: the one to resume from; None: step 1. finished: there is nothing left to do. notes: lines for
    the user about how it was found.
    """

    checkpoint: Path | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def find_start_point(recipe: Recipe) -> StartPoint:
    """Look for a run of ``recipe``, whose ``max_steps`` is set, in its output folder, checkpoints and Hub.

    A finished run is extended if the recipe has more steps than it had. Damaged checkpoints newer than the
    one to resume from are renamed. Raises UserError for a run of another recipe (a line for each key), for
    fewer steps than are done, and for a finished run without a checkpoint to extend it from.
    """
    root, output_dir = checkpoint_root(recipe.train), recipe.train.output_dir
    done = None
    if (output_dir / RECIPE_FILE).is_file():
        earlier = _load_same_run(recipe, output_dir)
        done = finished_steps(output_dir)
        if done is not None and has_nothing_left(recipe, earlier, done, output_dir):
            note = (
                f"{output_dir}: finished after {done} steps, nothing left to do; "
                "to extend it, raise train.max_steps or train.epochs"
            )
            return StartPoint(finished=True, notes=[note])
    checkpoint, notes = _find_checkpoint(recipe, root)
    if checkpoint is not None:
        notes += _length_note(recipe, _load_same_run(recipe, checkpoint))
        _refuse_fewer_steps(recipe, read_manifest(checkpoint)["step"], checkpoint)
    elif done is not None:
        raise _not_extendable(output_dir, root, done)
    notes += [f"renamed to {path}" for path in quarantine_newer(root, checkpoint)]
    if checkpoint:
        notes.append(f"resuming from {checkpoint}")
    else:
        notes.append(f"no checkpoint in {root}; starting from step 1")
    return StartPoint(checkpoint, notes=notes)


def has_nothing_left(recipe: Recipe, earlier: Recipe, done: int, folder: Path) -> bool:
    """Return whether ``done`` steps of the ``earlier`` recipe, in ``folder``, are all that the recipe trains.

    Raises UserError if more than `CHANGEABLE_KEYS` differ, and for fewer steps than are done.
    """
    _refuse_differences(recipe, earlier, folder)
    _refuse_fewer_steps(recipe, done, folder)
    return _max_steps(recipe) <= _max_steps(earlier)


def check_resumable(recipe: Recipe) -> None:
    """Raise UserError, as `find_start_point` does, for a run that cannot be resumed. Changes nothing."""
    root, output_dir = checkpoint_root(recipe.train), recipe.train.output_dir
    if not (output_dir / RECIPE_FILE).is_file():
        checkpoint, _ = latest_valid(root)
        if checkpoint is not None:
            _load_same_run(recipe, checkpoint)
        return
    earlier, done = _load_same_run(recipe, output_dir), finished_steps(output_dir)
    if done is None or has_nothing_left(recipe, earlier, done, output_dir):
        return
    if newest_checkpoint(root) is None:
        raise _not_extendable(output_dir, root, done)


def _not_extendable(output_dir: Path, root: Path, done: int) -> UserError:
    return UserError(
        f"{root}: no checkpoint of the finished run in {output_dir} is left to extend it from; "
        f"restore step-{done}, or start a new run from its adapter with model.init_from={output_dir}"
    )


def _find_checkpoint(recipe: Recipe, root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint in ``root`` or on the Hub, and notes for the user."""
    if root.is_dir():
        atomic.remove_leftovers(root)
    checkpoint, problems = latest_valid(root)
    notes = [f"damaged: {problem}" for problem in problems]
    if recipe.train.push_to_hub:
        local_step = -1 if checkpoint is None else read_manifest(checkpoint)["step"]
        notes += fetch_newer_checkpoint(recipe.train.push_to_hub, root, local_step)
        checkpoint, _ = latest_valid(root)
    return checkpoint, notes


def _load_same_run(recipe: Recipe, folder: Path) -> Recipe:
    """Load the recipe of the run in ``folder``. Raises UserError unless only `CHANGEABLE_KEYS` differ."""
    earlier = load_recipe(folder / RECIPE_FILE, require=())
    _refuse_differences(recipe, earlier, folder)
    return earlier


def _refuse_differences(recipe: Recipe, earlier: Recipe, folder: Path) -> None:
    current = _with_earlier_place(_with_earlier_commit(recipe, earlier), earlier)
    differences = list(_differences(_comparable(earlier), _comparable(current)))
    if differences:
        raise UserError("\n".join(f"{folder}: a run of another recipe: {line}" for line in differences))


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values, with the default of rsLoRA filled in: it was false in earlier versions."""
    values = recipe.model_dump(mode="json")
    values["lora"]["use_rslora"] = recipe.lora.rank_stabilized
    return values


def _refuse_fewer_steps(recipe: Recipe, done: int, folder: Path) -> None:
    steps = _max_steps(recipe)
    if steps < done:
        raise UserError(
            f"train.max_steps: got {steps} (from train.epochs, if that is set), but {folder} has trained "
            f"{done} steps already; use {done} or more, or choose another train.output_dir"
        )


def _max_steps(recipe: Recipe) -> int:
    """Return ``train.max_steps``, which a resolved recipe always has."""
    assert recipe.train.max_steps is not None
    return recipe.train.max_steps


def _length_note(recipe: Recipe, earlier: Recipe) -> list[str]:
    """Return a note if the number of steps has changed."""
    before, now = _max_steps(earlier), _max_steps(recipe)
    if before == now:
        return []
    return [
        f"train.max_steps was {before}, is {now}: the learning-rate schedule is recomputed for {now} steps"
    ]


def _differences(earlier: Any, current: Any, key: str = "") -> Iterator[str]:
    """Yield a line for each value that has changed."""
    if isinstance(earlier, dict) and isinstance(current, dict):
        for name in {**earlier, **current}:
            full_key = f"{key}.{name}" if key else name
            yield from _differences(earlier.get(name), current.get(name), full_key)
    elif earlier != current and key not in CHANGEABLE_KEYS:
        yield f"{key} was {earlier}, is {current}; set it back, or choose another train.output_dir"


# --- model.init_from on the Hub: the same commit for the whole run ---


def pin_init_from(recipe: Recipe, checkpoint: Path | None) -> Recipe:
    """Return the recipe with a commit in ``model.init_from``: the checkpoint's, or the newest one.

    Raises UserError if that cannot be fetched.
    """
    init_from = recipe.model.init_from
    if init_from is None or hub_name(init_from) is None:
        return recipe
    if checkpoint is not None:
        earlier = load_recipe(checkpoint / RECIPE_FILE, require=()).model.init_from
        if earlier is not None:
            fetch_model(earlier)
            return _with_init_from(recipe, earlier)
    return _with_init_from(recipe, Path(pinned_name(init_from, fetch_model(init_from))))


def _with_earlier_commit(recipe: Recipe, earlier: Recipe) -> Recipe:
    """Return the recipe with the earlier run's ``model.init_from`` if it is a commit of the same repository.

    A commit in ``recipe`` itself stays as it is.
    """
    current, earlier_start = recipe.model.init_from, earlier.model.init_from
    if current is None or earlier_start is None:
        return recipe
    current_name, earlier_name = hub_name(current), hub_name(earlier_start)
    if current_name is None or earlier_name is None or current_name.repository != earlier_name.repository:
        return recipe
    names_a_commit = re.fullmatch(r"[0-9a-f]{40}", current_name.revision or "")
    return recipe if names_a_commit else _with_init_from(recipe, earlier_start)


def _with_earlier_place(recipe: Recipe, earlier: Recipe) -> Recipe:
    """Return the recipe of a stage as if its run had not been moved since the ``earlier`` recipe.

    A stage starts from the stage before it, beside its own folder.
    """
    start, earlier_start = recipe.model.init_from, earlier.model.init_from
    if start is None or earlier_start is None or start.name != earlier_start.name:
        return recipe
    folders = (recipe.train.output_dir.absolute().parent, earlier.train.output_dir.parent.name)
    is_stage = folders == (start.parent, earlier_start.parent.name)
    return _with_init_from(recipe, earlier_start) if is_stage else recipe


def _with_init_from(recipe: Recipe, init_from: Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": init_from})})
