"""Where a run goes on: from its newest checkpoint that is whole, if it is this recipe's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.errors import UserError

from .checkpoints import checkpoint_root, newest_good, read_manifest, set_aside_after
from .hub import fetch_newer
from .output_dir import finished_steps
from .start_from import as_pinned

# Keys that may change within a run: how long it is, where it is kept and shown, and how fast its data come.
FREE = {
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
    "eval.keep",
}


@dataclass(frozen=True)
class Start:
    """Where a run begins. checkpoint: to go on from, or None to begin with step 1; finished: nothing is left to do;
    notes: what a user should know of how it was found."""

    checkpoint: Path | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def find_start(recipe: Recipe) -> Start:
    """What there is of a run of ``recipe``, whose length is in steps, in its output folder and among its checkpoints.

    A finished run is extended where the recipe has more steps than it had. Damaged checkpoints newer than the one to
    resume from are renamed. Raises UserError for a run of another recipe (a line for each key), for fewer steps than are
    done, and for a finished run without a checkpoint to extend it from.
    """
    root, output_dir = checkpoint_root(recipe.train), recipe.train.output_dir
    done = None
    if (output_dir / RECIPE_FILE).is_file():
        earlier = _same_run(recipe, output_dir)
        done = finished_steps(output_dir)
        if done is not None:
            _refuse_fewer(recipe, done, output_dir)
            if recipe.train.max_steps <= earlier.train.max_steps:
                longer = "to extend it, raise train.max_steps or train.epochs"
                return Start(
                    finished=True,
                    notes=[f"{output_dir}: finished after {done} steps, nothing is left to do; {longer}"],
                )
    if root.is_dir():
        atomic.remove_leftovers(root)
    checkpoint, wrong = newest_good(root)
    notes = [f"damaged: {problem}" for problem in wrong]
    if recipe.train.push_to_hub:
        newest_here = -1 if checkpoint is None else read_manifest(checkpoint)["step"]
        notes += fetch_newer(recipe.train.push_to_hub, root, newest_here)
        checkpoint, _ = newest_good(root)
    if checkpoint is not None:
        notes += _new_length(recipe, _same_run(recipe, checkpoint))
        _refuse_fewer(recipe, read_manifest(checkpoint)["step"], checkpoint)
    elif done is not None:
        raise UserError(
            f"{root}: no checkpoint of the finished run in {output_dir} is left to extend it from; "
            f"restore step-{done}, or start a new run from its adapter with model.init_from={output_dir}"
        )
    aside = [f"set aside as {path}" for path in set_aside_after(root, checkpoint)]
    found = (
        f"going on from {checkpoint}"
        if checkpoint
        else f"no checkpoint in {root}; beginning with the first step"
    )
    return Start(checkpoint, notes=[*notes, *aside, found])


def _same_run(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of the run in ``folder``. UserError where it differs from ``recipe`` in more than `FREE` keys."""
    earlier = load_recipe(folder / RECIPE_FILE, require=())
    now = as_pinned(recipe, earlier)
    differing = list(_differences(earlier.model_dump(mode="json"), now.model_dump(mode="json")))
    if differing:
        raise UserError("\n".join(f"{folder}: a run of another recipe: {line}" for line in differing))
    return earlier


def _refuse_fewer(recipe: Recipe, done: int, folder: Path) -> None:
    steps = recipe.train.max_steps
    if steps < done:
        raise UserError(
            f"train.max_steps: got {steps} (from train.epochs, if that is set), but {folder} has trained {done} steps "
            f"already; use {done} or more, or choose another train.output_dir"
        )


def _new_length(recipe: Recipe, earlier: Recipe) -> list[str]:
    """A note where the number of steps has changed."""
    was, now = earlier.train.max_steps, recipe.train.max_steps
    if was == now:
        return []
    return [f"train.max_steps was {was}, is {now}: the learning-rate schedule is recomputed for {now} steps"]


def _differences(earlier: Any, now: Any, key: str = "") -> Iterator[str]:
    """A line for each value that is not what it was."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in {**earlier, **now}:
            yield from _differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif earlier != now and key not in FREE:
        yield f"{key} was {earlier}, is {now}; set it back, or choose another train.output_dir"
