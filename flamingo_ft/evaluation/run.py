"""Measuring an adapter that lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flamingo_ft.adapters import load_trained
from flamingo_ft.config import RECIPE_FILE, DataSource, Recipe, load_recipe
from flamingo_ft.data import Sample, open_data
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model

from .accuracy import answer_questions
from .questions import questions_of
from .results import AFTER, Results


def evaluate_adapter(adapter: str | Path, data: str | None = None) -> dict[str, Any]:
    """Accuracy of an adapter on the samples of ``data``, by default on the held-out samples of its recipe."""
    folder = fetch_model(adapter)
    recipe_file = folder / RECIPE_FILE
    if not recipe_file.is_file():
        remedy = "give a run's output directory"
        raise UserError(f"{adapter}: not the folder of a run, {RECIPE_FILE} not found; {remedy}")
    recipe = load_recipe(recipe_file, require=() if data else ("data",))
    samples = held_out_samples(recipe if data is None else on_other_data(recipe, Path(data)))
    if not samples:
        raise UserError(f"{recipe_file}: data.eval is empty; name samples with --data FILE")
    model, processor = load_trained(folder)
    questions = questions_of(samples)
    options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
    answers = answer_questions(model, processor, questions, **options)
    return {"eval": Results(questions, {AFTER: answers}).summary()}


def on_other_data(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the samples of ``path`` held out in place of its own, read as the rest of its ``data`` says."""
    source = DataSource(path=path)
    data = recipe.data.model_copy(update={"train": (source,), "eval": (source,), "eval_fraction": None})
    return recipe.model_copy(update={"data": data, "eval": recipe.eval.model_copy(update={"max_samples": None})})


def held_out_samples(recipe: Recipe) -> list[Sample]:
    """The held-out samples of a recipe, the first ``eval.max_samples`` of each source."""
    return open_data(recipe.data, recipe.train.seed).held_out_samples(recipe.eval.max_samples)
