"""Evaluate an adapter or a merged model on disk, as `flamingo-ft eval` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.config.loading import parse_override
from flamingo_ft.config.metric_names import parse_metric
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.progress import progress_bars

from .questions import questions_of
from .results import AFTER, Results
from .select_metrics import select_metrics

_NO_RECIPE = Path(__file__).with_name("no_recipe.yaml")
_NO_TRAINING_DATA = 'data.train=[{"hub": "none/none"}]'  # it is not read, so it need not exist here
_USED_KEYS = (
    "data.eval",
    "data.allow_urls",
    "data.on_bad_sample",
    "eval.batch_size",
    "eval.max_new_tokens",
    "eval.max_samples",
    "eval.metrics",
)


def evaluate_adapter(
    adapter: str | Path,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
    metrics: Sequence[str] = (),
    *,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Score an adapter or a merged model on held-out samples, by the metrics of its recipe.

    data: a file of samples; by default the held-out samples of its recipe. overrides: ``key=value`` for the
    recipe's ``data.eval`` and ``eval`` sections; with ``data``, ``data.eval.0`` is that file. report: called
    with a line for each skipped sample. metrics: names of more metrics, or users' functions
    (``FILE.py:function``, relative to the current directory). quantization: see `Predictor.from_pretrained`.

    Returns a record as in metrics.json. Raises UserError for keys that evaluation does not use, for metrics
    that cannot be computed, and if there are no held-out samples.
    """
    more = [parse_metric(name) for name in metrics]
    folder = fetch_model(adapter)
    recipe = recipe_for_evaluation(adapter, folder, data, overrides)
    opened = open_data(recipe.data, recipe.train.seed)
    samples = opened.eval_samples(recipe.eval.max_samples)
    for reason in opened.skipped.values():
        report(f"skipped: {reason}")
    if not samples:
        raise UserError(f"{adapter}: no held-out samples; name some with --data FILE")
    questions = questions_of(samples)
    selected = select_metrics(recipe.eval, questions, more)
    predictor = Predictor.from_pretrained(folder, quantization=quantization)
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("evaluating", total=len(questions), note="")
        answers = predictor.answer(
            questions,
            batch_size=recipe.eval.batch_size,
            max_new_tokens=recipe.eval.max_new_tokens,
            on_batch=partial(progress.advance, bar),
        )
    return {"eval": Results(questions, {AFTER: answers}, selected).summary()}


def recipe_for_evaluation(
    adapter: str | Path, folder: Path, data: str | Path | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Return the recipe beside an adapter with ``data`` and ``overrides`` applied.

    Converted adapters and merged models may have no recipe; they are evaluated with default settings.
    """
    for override in overrides:
        _check_used(override)
    file = folder / RECIPE_FILE
    if not file.is_file():
        file = _NO_RECIPE
        _check_model(adapter, folder, has_samples=data is not None or any(map(_sets_samples, overrides)))
    values = [*(() if data is None else _data_overrides(data)), *overrides]
    if any(parse_override(override).location == ("eval", "metrics") for override in overrides):
        values.append("eval.metric=loss")  # otherwise the metric that selected would be computed as well
    if load_recipe(file, values, require=()).data.eval_fraction is not None:
        return load_recipe(file, values, require=("data",))
    recipe = load_recipe(file, [_NO_TRAINING_DATA, *values], require=("data",))
    sources = recipe.data.eval
    if not sources:
        raise UserError(f"{adapter}: data.eval is empty; name samples with --data FILE")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": sources})})


def _data_overrides(data: str | Path) -> list[str]:
    """Make ``data`` the only source of held-out samples, and use all of it."""
    sources = json.dumps([{"path": str(Path(data).absolute())}], ensure_ascii=False)
    return [f"data.eval={sources}", "data.eval_fraction=null", "eval.max_samples=null"]


def _sets_samples(override: str) -> bool:
    return parse_override(override).location == ("data", "eval")


def _check_used(override: str) -> None:
    location = parse_override(override).location
    used_keys = [tuple(key.split(".")) for key in _USED_KEYS]
    if not any(location[: len(used)] == used for used in used_keys):
        key = ".".join(map(str, location))
        raise UserError(f"override {key}: evaluation does not use it; it uses {', '.join(_USED_KEYS)}")


def _check_model(adapter: str | Path, folder: Path, has_samples: bool) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{adapter}: not an adapter or a merged model; give the folder that a run or a conversion wrote"
        )
    if not has_samples:
        raise UserError(
            f"{adapter}: has no {RECIPE_FILE}, so no held-out samples; name some with --data FILE"
        )
