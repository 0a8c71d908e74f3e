"""Check the data of all stages of a recipe: each source once, although several stages may use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_ft.config import DataSource, Recipe, stage_folder_name

from .check_data import check_data
from .check_report import CheckReport


@dataclass(frozen=True)
class StageGroup:
    """Stages whose rows are read alike. runs: by name; number: of the first of them, from 0."""

    number: int
    runs: dict[str, Recipe]

    @property
    def recipe(self) -> Recipe:
        """The last run, with the sources of all."""
        last = [*self.runs.values()][-1]
        sources = {
            split: _distinct(source for run in self.runs.values() for source in getattr(run.data, split))
            for split in ("train", "eval")
        }
        return last.model_copy(update={"data": last.data.model_copy(update=sources)})


def check_recipe(
    recipe: Recipe, name: str, folder: Path, probe: bool = False
) -> list[tuple[Path, CheckReport]]:
    """Check the data of a recipe; return each report with the folder that it is in.

    There is one report in ``folder``, or one in a folder below it for each group of stages that read rows
    differently. probe: of the data of the last stage. Errors are those of `check_data`.
    """
    if not recipe.stages:
        return [(folder, check_data(recipe, name, folder, probe))]
    groups = stage_groups(recipe)
    reports = []
    for group in groups:
        first = next(iter(group.runs))
        place = folder / stage_folder_name(group.number, first) if len(groups) > 1 else folder
        title = f"{name}: {', '.join(group.runs)}"
        of_last = probe and group is groups[-1]
        reports.append((place, check_data(group.recipe, title, place, of_last, group.runs)))
    return reports


def stage_groups(recipe: Recipe) -> list[StageGroup]:
    """Return the stages in groups with the same method, limits and settings of ``data`` but its sources.

    The group of the last stage comes last.
    """
    groups: dict[Any, StageGroup] = {}
    for number, (stage, run) in enumerate(zip(recipe.stages, recipe.runs, strict=True)):
        settings = run.data.model_dump(mode="json", exclude={"train", "eval"})
        answers = run.train.grpo.max_completion_tokens if run.train.method == "grpo" else None
        seed = run.train.seed if run.data.eval_fraction else None
        key = repr((run.train.method, answers, settings, seed))
        group = groups.pop(key, StageGroup(number, {}))
        group.runs[stage.name] = run
        groups[key] = group
    return [*groups.values()]


def _distinct(sources: Iterable[DataSource]) -> tuple[DataSource, ...]:
    """Return the sources without those that differ from an earlier one in their weight alone."""
    distinct = {source.model_copy(update={"weight": 1.0}).model_dump_json(): source for source in sources}
    return tuple(distinct.values())
