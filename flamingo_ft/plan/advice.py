"""What to change in a recipe that needs too much memory, each change planned again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flamingo_ft.config import Recipe

from .gpus import GPUS
from .memory import Plan, Planner

Values = Mapping[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Change:
    """Values to give a recipe's keys, and the plan with them and with the changes before.

    saved: bytes off the peak by this change, on top of those before.
    """

    values: Values
    plan: Plan
    saved: int

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in self.values.items()
        ]


def advise(planner: Planner, plan: Plan) -> list[Change]:
    """Changes in the order of what each saves alone, each on top of those before, until the smallest card holds the run.

    Those that would not go together with an earlier one, or save nothing on top, are left out. Empty where every card
    holds the run as it is.
    """
    if _fits_all(plan):
        return []
    alone = [(values, _planned(planner, planner.recipe, values)) for values in candidates(planner.recipe)]
    possible = sorted((found for found in alone if found[1]), key=lambda found: found[1].peak)
    made: list[Change] = []
    recipe = planner.recipe
    for values, planned in possible:
        planned = _planned(planner, recipe, values) if made else planned
        if planned and planned.peak < plan.peak and not _fits_all(plan):
            made.append(Change(values, planned, plan.peak - planned.peak))
            recipe, plan = with_values(recipe, values), planned
    return made


def _fits_all(plan: Plan) -> bool:
    return all(gpu.fits(plan) for gpu in GPUS)


def candidates(recipe: Recipe) -> list[Values]:
    """Changes that could help and leave what is learned as good as it was, or nearly; not those made already."""
    offered: list[Values] = [
        {"train.gradient_checkpointing": True},
        {"train.optimizer": "paged_adamw_8bit"},
        {"train.optimizer_in_backward": True},
        {"trainable.dtype": "bf16"},
        {"model.language.quantization": "nf4"},
        {"model.vision.quantization": "nf4"},
    ]
    if recipe.train.batch_size > 1:
        steps = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
        offered.append({"train.batch_size": 1, "train.gradient_accumulation_steps": steps})
    if recipe.model.init_from is not None:  # a fresh bridge has to train whole
        offered.append({"model.bridge_quantization": "nf4"})
        whole = [part for part in ("perceiver", "cross_attention") if getattr(recipe.trainable, part)]
        offered += [{f"trainable.{part}": False, f"lora.{part}": {"r": 16}} for part in whole]
    return [values for values in offered if _is_new(recipe, values)]


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with other values. pydantic.ValidationError where they contradict the rest."""
    changed = recipe.model_dump()
    for key, value in values.items():
        *way, last = key.split(".")
        section = changed
        for step in way:
            section = section[step]
        section[last] = value
    return Recipe.model_validate(changed)


def _planned(planner: Planner, recipe: Recipe, values: Values) -> Plan | None:
    """The plan with other values; None where they contradict the recipe."""
    try:
        changed = with_values(recipe, values)
    except ValidationError:
        return None
    return planner.plan(changed)


def _is_new(recipe: Recipe, values: Values) -> bool:
    """Whether the recipe has another value for the first key; fp4 is as small as nf4."""
    section: Any = recipe
    key, value = next(iter(values.items()))
    for step in key.split("."):
        section = getattr(section, step)
    return section != value and section != "fp4"
