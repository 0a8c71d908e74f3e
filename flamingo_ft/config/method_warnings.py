"""What is probably unintended in the settings of a training method that refines a trained model."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe

MAX_RATE = 1e-3  # ten times what the guide names, and what a new bridge is trained with by default


def method_warnings(recipe: Recipe) -> Iterator[str]:
    """Warn of a method other than sft that has no trained start, or a high learning rate.

    recipe: of one stage.
    """
    method, rate = recipe.train.method, recipe.train.learning_rate
    if method == "sft":
        return
    if recipe.model.init_from is None:
        yield (
            f"train.method {method} refines a model that answers already, but the bridge is new "
            "(model.init_from is null); train one with method sft, then set model.init_from to its folder"
        )
    if rate is not None and rate >= MAX_RATE:
        yield (
            f"train.learning_rate {rate:g} is high for train.method {method}, which refines a trained model; "
            "1e-4 and below are usual"
        )
