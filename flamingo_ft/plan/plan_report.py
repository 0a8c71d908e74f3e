"""All that `flamingo-ft plan` tells of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError

from flamingo_ft.config import Recipe
from flamingo_ft.config.tables import BRIDGE_PARTS
from flamingo_ft.formatting import GIB, MIB

from .planner import Plan, Planner


@dataclass(frozen=True)
class PlanReport:
    """cuda: the plan for a GPU, and what to change where not every card holds it; cpu: the plan without one, where this
    machine has none."""

    cuda: Plan
    changes: list[Change]
    cpu: Plan | None

    def record(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "cuda": plan_record(self.cuda),
            "cpu": None if self.cpu is None else plan_record(self.cpu),
            "gpus": [gpu_record(gpu, self.cuda) for gpu in GPUS],
            "assumed": {"cuda_context": CONTEXT, "fragmentation": FRAGMENTATION},
            "changes": [
                {"overrides": change.overrides, "saved": change.saved, "peak": change.plan.peak}
                for change in self.changes
            ],
        }


def make_plan_report(recipe: Recipe, text_tokens: int | None = None, images: int | None = None) -> PlanReport:
    """Plan ``recipe``, and search for changes where it is too large for a card."""
    planner = Planner(recipe, "cuda", text_tokens=text_tokens, images=images)
    plan = planner.plan(recipe)
    sizes = {"text_tokens": plan.batch.text_tokens, "images": plan.batch.images}
    cpu = None if torch.cuda.is_available() else Planner(recipe, "cpu", **sizes).plan(recipe)
    return PlanReport(plan, advise(planner, plan), cpu)


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "batch": asdict(plan.batch),
        "components": [asdict(component) for component in plan.components],
        "trainable_parameters": plan.trainable_parameters,
        "paged": plan.step.paged,
        "activations": plan.activations,
        "gradients_at_peak": plan.step.gradients_at_peak,
        "peak": plan.peak,
    }


def gpu_record(gpu: Gpu, plan: Plan) -> dict[str, Any]:
    """Whether a card holds a plan."""
    return {
        "name": gpu.name,
        "usable_gib": gpu.usable_gib,
        "needed": int(gpu.needed(plan)),
        "fits": gpu.fits(plan),
    }


# Outside torch's allocator: the CUDA context with the loaded kernels of torch and bitsandbytes. Not measured here; users
# report 0.3 to 0.6 GiB by card and driver.
CONTEXT = 0.5 * GIB
FRAGMENTATION = 0.03  # of the peak: what the caching allocator holds beyond live tensors


@dataclass(frozen=True)
class Gpu:
    """A card: usable_gib as torch reports it, less than its name says; workspace in bytes, what cuBLAS takes through
    torch's allocator, twice: one handle in the forward and one in the backward thread (ATen/cuda/CublasHandlePool.cpp)."""

    name: str
    usable_gib: float
    workspace: int = 2 * (8 * MIB + 128 * 1024)

    def needed(self, plan: Plan) -> float:
        """Bytes of the card's memory that the plan takes."""
        return plan.peak * (1 + FRAGMENTATION) + self.workspace + CONTEXT

    def fits(self, plan: Plan) -> bool:
        return self.needed(plan) <= self.usable_gib * GIB


HOPPER_WORKSPACE = 2 * 32 * MIB

GPUS = (  # usable_gib: torch.cuda.get_device_properties(0).total_memory, as quoted in out-of-memory messages
    Gpu("T4 16 GB", 14.56),
    Gpu("L4 24 GB", 22.03),
    Gpu("RTX 3090 24 GB", 23.57),
    Gpu("RTX 4090 24 GB", 23.52),
    Gpu("A100 40 GB", 39.38),
    Gpu("A100 80 GB", 79.14),
    Gpu("H100 80 GB", 79.10, HOPPER_WORKSPACE),
    Gpu("H200 141 GB", 139.80, HOPPER_WORKSPACE),
)


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
        for part in BRIDGE_PARTS:
            if part.takes_lora and getattr(recipe.trainable, part.name):
                offered.append({f"trainable.{part.name}": False, f"lora.{part.name}": {"r": 16}})
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
