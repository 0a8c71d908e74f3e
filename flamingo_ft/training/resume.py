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
from .output_dir import METRICS_FILE
from .start_from import as_pinned

# Keys that may change within a run: where it is kept and shown, and how fast its data come.
FREE = {
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
    """What there is of a run of ``recipe`` in its output folder and among its checkpoints.

    Raises UserError, a line for each key, where that is a run of another recipe. Damaged checkpoints newer than the
    one to go on from are renamed.
    """
    root, output_dir = checkpoint_root(recipe.train), recipe.train.output_dir
    if (output_dir / RECIPE_FILE).is_file():
        _refuse_another(recipe, output_dir)
        if (output_dir / METRICS_FILE).is_file():
            return Start(finished=True)
    if root.is_dir():
        atomic.sweep(root)
    checkpoint, wrong = newest_good(root)
    notes = [f"damaged: {problem}" for problem in wrong]
    if recipe.train.push_to_hub:
        newest_here = -1 if checkpoint is None else read_manifest(checkpoint)["step"]
        notes += fetch_newer(recipe.train.push_to_hub, root, newest_here)
        checkpoint, _ = newest_good(root)
    if checkpoint is not None:
        _refuse_another(recipe, checkpoint)
    aside = [f"set aside as {path}" for path in set_aside_after(root, checkpoint)]
    found = f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {root}; beginning with the first step"
    return Start(checkpoint, notes=[*notes, *aside, found])


def _refuse_another(recipe: Recipe, folder: Path) -> None:
    earlier = load_recipe(folder / RECIPE_FILE, require=())
    now = as_pinned(recipe, earlier)
    differing = list(_differences(earlier.model_dump(mode="json"), now.model_dump(mode="json")))
    if differing:
        raise UserError("\n".join(f"{folder}: a run of another recipe: {line}" for line in differing))


def _differences(earlier: Any, now: Any, key: str = "") -> Iterator[str]:
    """A line for each value that is not what it was."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in {**earlier, **now}:
            yield from _differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif earlier != now and key not in FREE:
        yield f"{key} was {earlier}, is {now}; set it back, or choose another train.output_dir"
