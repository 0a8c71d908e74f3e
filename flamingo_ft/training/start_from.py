"""What a run starts from, where that is on the Hub: fetched before anything else, and the same when the run goes on."""

from __future__ import annotations

import re
from pathlib import Path

from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.hub import fetch_model, hub_name, pinned_name


def with_pinned_start(recipe: Recipe, earlier: Path | None) -> Recipe:
    """The recipe with the commit in ``model.init_from``: that of the run in ``earlier``, or the newest, which is fetched.

    Raises UserError where it cannot be had.
    """
    wanted = recipe.model.init_from
    if wanted is None or hub_name(wanted) is None:
        return recipe
    kept = None if earlier is None else load_recipe(earlier / RECIPE_FILE, require=()).model.init_from
    found = fetch_model(wanted if kept is None else kept)
    return _starting_from(recipe, kept or Path(pinned_name(wanted, found)))


def as_pinned(recipe: Recipe, earlier: Recipe) -> Recipe:
    """The recipe with the start of an earlier one, where that is a commit of what it names."""
    now, then = (one.model.init_from and hub_name(one.model.init_from) for one in (recipe, earlier))
    same = (
        now
        and then
        and now.repository == then.repository
        and not re.fullmatch(r"[0-9a-f]{40}", now.revision or "")
    )
    return _starting_from(recipe, earlier.model.init_from) if same else recipe


def _starting_from(recipe: Recipe, start: Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": start})})
