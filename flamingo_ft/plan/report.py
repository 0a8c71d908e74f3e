"""All that `flamingo-ft plan` tells of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flamingo_ft.config import Recipe

from .advice import Change, advise
from .gpus import CONTEXT, FRAGMENTATION, GPUS, Gpu
from .memory import Plan, Planner


@dataclass(frozen=True)
class Report:
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


def make_report(recipe: Recipe, text_tokens: int | None = None, images: int | None = None) -> Report:
    """Plan ``recipe``, and search for changes where it is too large for a card."""
    planner = Planner(recipe, "cuda", text_tokens=text_tokens, images=images)
    plan = planner.plan(recipe)
    sizes = {"text_tokens": plan.batch.text_tokens, "images": plan.batch.images}
    cpu = None if torch.cuda.is_available() else Planner(recipe, "cpu", **sizes).plan(recipe)
    return Report(plan, advise(planner, plan), cpu)


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
