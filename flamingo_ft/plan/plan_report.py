"""What `flamingo-ft plan` reports: the plan, the GPUs that hold it, and what to change if some do not."""

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

# Outside torch's allocator: the CUDA context with the kernels that torch and bitsandbytes load. Users report
# 0.3 to 0.6 GiB, depending on GPU and driver; not measured here.
CONTEXT = 0.5 * GIB
FRAGMENTATION = 0.03  # of the peak: what the caching allocator holds beyond live tensors


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        usable_gib: as torch reports it, which is less than the name says.
        workspace: bytes that cuBLAS takes from torch's allocator, once in the forward and once in the
            backward thread (ATen/cuda/CublasHandlePool.cpp).
    """

    name: str
    usable_gib: float
    workspace: int = 2 * (8 * MIB + 128 * 1024)

    def needed(self, plan: Plan) -> float:
        """Return the bytes of GPU memory that the plan takes."""
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


@dataclass(frozen=True)
class PlanReport:
    """The plan for a GPU, changes if not every GPU holds it, and without a GPU the plan for a CPU."""

    cuda: Plan
    changes: list[Change]
    cpu: Plan | None

    def record(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values, sizes in bytes."""
        return {
            "cuda": plan_record(self.cuda),
            "cpu": None if self.cpu is None else plan_record(self.cpu),
            "gpus": [_gpu_record(gpu, self.cuda) for gpu in GPUS],
            "assumed": {"cuda_context": CONTEXT, "fragmentation": FRAGMENTATION},
            "changes": [
                {"overrides": change.overrides, "saved": change.saved, "peak": change.plan.peak}
                for change in self.changes
            ],
        }


@dataclass(frozen=True)
class DevicePlans:
    """The plans of a recipe for a GPU and, without a GPU, for a CPU; planner: of those for a GPU."""

    planner: Planner
    cuda: Plan
    cpu: Plan | None

    @classmethod
    def of(cls, recipe: Recipe, text_tokens: int | None = None, images: int | None = None) -> DevicePlans:
        """Plan ``recipe``. text_tokens, images: as for `make_plan_report`."""
        planner = Planner(recipe, "cuda", text_tokens=text_tokens, images=images)
        plan = planner.plan(recipe)
        sizes = {"text_tokens": plan.batch.text_tokens, "images": plan.batch.images}
        cpu = None if torch.cuda.is_available() else Planner(recipe, "cpu", **sizes).plan(recipe)
        return cls(planner, plan, cpu)

    def report(self) -> PlanReport:
        """Return the report, with changes that save memory if some GPU is too small."""
        return PlanReport(self.cuda, suggest_changes(self.planner, self.cuda), self.cpu)


def make_plan_report(recipe: Recipe, text_tokens: int | None = None, images: int | None = None) -> PlanReport:
    """Plan ``recipe``, and look for changes that save memory if some GPU is too small.

    text_tokens, images: sizes of the longest sample; by default they are read from the data.
    """
    return DevicePlans.of(recipe, text_tokens, images).report()


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON-compatible values, sizes in bytes."""
    return {
        "batch": asdict(plan.batch),
        "components": [asdict(component) for component in plan.components],
        "trainable_parameters": plan.trainable_parameters,
        "paged": plan.step.paged,
        "activations": plan.activations,
        "gradients_at_peak": plan.step.gradients_at_peak,
        "peak": plan.peak,
    }


def _gpu_record(gpu: Gpu, plan: Plan) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "usable_gib": gpu.usable_gib,
        "needed": int(gpu.needed(plan)),
        "fits": gpu.fits(plan),
    }


# --- changes that save memory ---

Values = Mapping[str, Any]  # dotted recipe key -> value


@dataclass(frozen=True)
class Change:
    """New values for recipe keys, and the plan with this and all earlier changes.

    saved: bytes by which this change lowers the peak, on top of the earlier ones.
    """

    values: Values
    plan: Plan
    saved: int

    @property
    def overrides(self) -> list[str]:
        """The values as the command line takes them: ``KEY=VALUE``."""
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in self.values.items()
        ]


def suggest_changes(planner: Planner, plan: Plan) -> list[Change]:
    """Return changes, each on top of those before it, until every GPU holds the run.

    They are tried in the order of what each saves alone; those that contradict an earlier one or save nothing
    on top of it are left out. Empty if every GPU holds the run already.
    """
    if _fits_every_gpu(plan):
        return []
    alone = []
    for values in candidate_changes(planner.recipe):
        planned = _plan_with(planner, planner.recipe, values)
        if planned is not None:
            alone.append((values, planned))
    alone.sort(key=lambda candidate: candidate[1].peak)
    changes: list[Change] = []
    recipe = planner.recipe
    for values, planned in alone:
        on_top = _plan_with(planner, recipe, values) if changes else planned
        if on_top is not None and on_top.peak < plan.peak and not _fits_every_gpu(plan):
            changes.append(Change(values, on_top, plan.peak - on_top.peak))
            recipe, plan = with_values(recipe, values), on_top
    return changes


def _fits_every_gpu(plan: Plan) -> bool:
    return all(gpu.fits(plan) for gpu in GPUS)


def candidate_changes(recipe: Recipe) -> list[Values]:
    """Return changes that may save memory at little or no cost in quality, without those made already."""
    candidates: list[Values] = [
        {"train.gradient_checkpointing": True},
        {"train.optimizer": "paged_adamw_8bit"},
        {"train.optimizer_in_backward": True},
        {"trainable.dtype": "bf16"},
        {"model.language.quantization": "nf4"},
        {"model.vision.quantization": "nf4"},
    ]
    if recipe.train.batch_size > 1:
        steps = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
        candidates.append({"train.batch_size": 1, "train.gradient_accumulation_steps": steps})
    if recipe.model.init_from is not None:  # a new bridge must be trained in full
        candidates.append({"model.bridge_quantization": "nf4"})
        for part in BRIDGE_PARTS:
            if part.takes_lora and getattr(recipe.trainable, part.name):
                candidates.append({f"trainable.{part.name}": False, f"lora.{part.name}": {"r": 16}})
    return [values for values in candidates if _changes_anything(recipe, values)]


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """Return the recipe with other values. Raises pydantic.ValidationError if they contradict the rest."""
    changed = recipe.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        section = changed
        for name in path:
            section = section[name]
        section[last] = value
    return Recipe.model_validate(changed)


def _plan_with(planner: Planner, recipe: Recipe, values: Values) -> Plan | None:
    """Return the plan with other values, or None if they contradict the recipe."""
    try:
        changed = with_values(recipe, values)
    except ValidationError:
        return None
    return planner.plan(changed)


def _changes_anything(recipe: Recipe, values: Values) -> bool:
    """Whether the recipe has another value for the first key; fp4 is as small as nf4."""
    current: Any = recipe
    key, value = next(iter(values.items()))
    for name in key.split("."):
        current = getattr(current, name)
    return current != value and current != "fp4"
