"""The memory of every stage of a run; that of the largest one is the memory of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flamingo_ft.config import Recipe

from .plan_report import DevicePlans


@dataclass(frozen=True)
class StagePlansReport:
    """The plans of all stages, by name, and the one that needs the most memory on a GPU."""

    stages: dict[str, DevicePlans]
    largest: str

    def record(self) -> dict[str, Any]:
        """Return the report on the largest stage as JSON-compatible values, and the peak of each in bytes."""
        peaks = [
            {
                "name": name,
                "trainable_parameters": plans.cuda.trainable_parameters,
                "cuda_peak": plans.cuda.peak,
                "cpu_peak": None if plans.cpu is None else plans.cpu.peak,
            }
            for name, plans in self.stages.items()
        ]
        return {"stages": peaks, "largest": self.largest, **self.stages[self.largest].report().record()}


def make_stage_plans(
    recipe: Recipe, text_tokens: int | None = None, images: int | None = None
) -> StagePlansReport:
    """Plan every stage of ``recipe``; see `make_plan_report`."""
    # Each as if from the start of the first one: no run has to exist yet.
    runs = [run.model_copy(update={"model": recipe.model}) for run in recipe.runs]
    named = zip(recipe.stages, runs, strict=True)
    plans = {stage.name: DevicePlans.of(run, text_tokens, images) for stage, run in named}
    return StagePlansReport(plans, max(plans, key=lambda name: plans[name].cuda.peak))
