"""Measuring an adapter that lies on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_ft.adapters import load_trained
from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.config.overrides import parse_override
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.progress import progress_bars

from .accuracy import answer_questions
from .questions import questions_of
from .results import AFTER, Results

_NO_RECIPE = Path(__file__).with_name("no_recipe.yaml")
_NOT_READ = 'data.train=[{"hub": "none/none"}]'  # training samples need not be there to evaluate on others
_USED = (
    "data.eval",
    "data.allow_urls",
    "data.on_bad_sample",
    "eval.batch_size",
    "eval.max_new_tokens",
    "eval.max_samples",
)


def evaluate_adapter(
    adapter: str | Path,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy of an adapter or a merged model on held-out samples.

    data: a file of samples, by default those that its recipe holds out. overrides: `key=value` of the recipe's
    ``data.eval`` and ``eval``, as in training; ``data`` is then ``data.eval.0``. say: receives a line for each sample
    that was skipped. Raises UserError for keys that evaluation does not use, and where there are no samples.
    """
    folder = fetch_model(adapter)
    recipe = recipe_for_evaluation(adapter, folder, data, overrides)
    opened = open_data(recipe.data, recipe.train.seed)
    samples = opened.eval_samples(recipe.eval.max_samples)
    for reason in opened.skipped.values():
        say(f"skipped: {reason}")
    if not samples:
        raise UserError(f"{adapter}: no held-out samples; name some with --data FILE")
    model, processor = load_trained(folder)
    questions = questions_of(samples)
    options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("evaluating", total=len(questions), note="")
        answers = answer_questions(
            model, processor, questions, **options, advance=partial(progress.advance, bar)
        )
    return {"eval": Results(questions, {AFTER: answers}).summary()}


def recipe_for_evaluation(
    adapter: str | Path, folder: Path, data: str | Path | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe beside an adapter with ``data`` and ``overrides`` in it; defaults where there is none, as beside
    converted adapters and merged models."""
    for override in overrides:
        _check_used(override)
    file = folder / RECIPE_FILE
    if not file.is_file():
        file = _NO_RECIPE
        _check_model(adapter, folder, has_samples=data is not None or any(map(_names_samples, overrides)))
    values = [*(() if data is None else _as_overrides(data)), *overrides]
    if load_recipe(file, values, require=()).data.eval_fraction is not None:
        return load_recipe(file, values, require=("data",))
    recipe = load_recipe(file, [_NOT_READ, *values], require=("data",))
    sources = recipe.data.eval
    if not sources:
        raise UserError(f"{adapter}: data.eval is empty; name samples with --data FILE")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": sources})})


def _as_overrides(data: str | Path) -> list[str]:
    """``data`` as the only held-out samples, all of them."""
    sources = json.dumps([{"path": str(Path(data).absolute())}], ensure_ascii=False)
    return [f"data.eval={sources}", "data.eval_fraction=null", "eval.max_samples=null"]


def _names_samples(override: str) -> bool:
    return parse_override(override).location == ("data", "eval")


def _check_used(override: str) -> None:
    location = parse_override(override).location
    key = ".".join(map(str, location))
    if not any(location[: len(used)] == used for used in (tuple(name.split(".")) for name in _USED)):
        raise UserError(f"override {key}: evaluation does not use it; it uses {', '.join(_USED)}")


def _check_model(adapter: str | Path, folder: Path, has_samples: bool) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{adapter}: no adapter and no merged model; give the folder that a run or a conversion wrote"
        )
    if not has_samples:
        raise UserError(
            f"{adapter}: has no {RECIPE_FILE}, so no held-out samples; name some with --data FILE"
        )
