"""A recipe's file, or its name, and overrides (`key=value` on the command line) -> a validated `Recipe`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flamingo_ft.config.library import find_recipe, is_packaged
from flamingo_ft.config.paths import path_exists, path_locations, resolve_paths, value_at
from flamingo_ft.config.recipe import Recipe
from flamingo_ft.config.section import PathKind
from flamingo_ft.config.stage_errors import location_text, misplaced_keys
from flamingo_ft.config.stages import (
    ALTERNATIVES,
    STAGES,
    clear_stage_values,
    merge_stages,
    stage_differences,
)
from flamingo_ft.config.validation_errors import validation_errors
from flamingo_ft.config.yaml_document import Document, Location, parse
from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import ON_HUB, missing_path_message

RECIPE_FILE = "resolved_recipe.yaml"
"""The recipe with every default, the first file that a run writes: a folder that has it holds a run."""
METRICS_FILE = "metrics.json"
"""The last file that a run writes: a folder that has it holds a finished run."""
LOG_FILE = "log.jsonl"
"""What a run logs, an entry in a line."""
PREDICTIONS_FILE = "predictions.jsonl"
"""The answers to held-out questions, in the folder of a run or of an evaluation."""
RESULTS_FILE = "results.json"
"""The scores, in the folder of an evaluation."""
PROBE_FILE = "probe.json"
"""What the frozen tower can tell, in the folder of a run or of a check."""

REQUIREMENTS = {
    "data": {PathKind.INPUT},
    "backbones": {PathKind.TOWER, PathKind.WEIGHTS, PathKind.LANGUAGE},
    "start": {PathKind.START},
}
"""What `load_recipe` can require to exist -> the kinds of paths that lead to it."""


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, require: Collection[str] = tuple(REQUIREMENTS)
) -> Recipe:
    """Load and validate a recipe. Its paths become absolute, except those that a run writes to.

    path_or_name: a YAML file, or the name of a packaged recipe.
    overrides: `key=value`, the value read as YAML, an entry of a list by its index: `data.train.0.weight=2`.
        Paths in the file are relative to the file's folder, paths in overrides to the current directory
        (`flamingo_ft.config.paths`).
    require: what has to exist: the files of `data`, image folders included; folders and files of `backbones`;
        model.init_from (`start`).

    Raises UserError with one line per error, each with the file and line, or the override, that it comes
    from. Warns if a model is found only where earlier versions looked for it.
    """
    path = find_recipe(path_or_name)
    file = _read(path)
    if path.name == RECIPE_FILE:
        _add_earlier_defaults(file.values)
    sources = _Sources(file, path.parent, [parse_override(text) for text in overrides])
    values = apply_overrides(sources.file.values, sources.overrides)
    unresolved = copy.deepcopy(values)
    path_warnings = list(resolve_paths(values, sources.start_of))
    recipe = _validate(values, sources)
    kinds = {kind for requirement in require for kind in REQUIREMENTS[requirement]}
    errors = list(_missing_paths(values, unresolved, sources, kinds))
    if errors:
        raise _user_error(sources, errors)
    if path.name != RECIPE_FILE:  # a run's own recipe has the paths that its recipe had
        for location, warning in path_warnings:
            place = sources.line_and_name(location)[1]
            warnings.warn(f"{place}: {location_text(location, values)}: {warning}", stacklevel=2)
    return recipe


def _validate(values: Any, sources: _Sources) -> Recipe:
    """Validate a recipe's plain values. Raises UserError with all errors."""
    merged = merge_stages(values)
    errors = {
        location: f"{location_text(location, values)}: {message}"
        for location, message in misplaced_keys(values)
    }
    recipe = None
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        for location, message in validation_errors(Recipe, error, merged, values):
            errors.setdefault(location, message)
    if errors or recipe is None:
        raise _user_error(sources, list(errors.items()))
    return recipe


def _add_earlier_defaults(values: dict[str, Any]) -> None:
    """Add the gates' learning rate to a run's own recipe from before it was a key: that of their blocks."""
    train = values.get("train")
    if isinstance(train, dict) and isinstance(rates := train.get("learning_rates"), dict):
        rates.setdefault("gates", rates.get("cross_attention") or train.get("learning_rate"))


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default, which `load_recipe` reads as the same recipe.

    Stages have only what differs from the last one, whose values are the recipe's own.
    """
    values = recipe.model_dump(mode="json")
    if recipe.stages:
        values[STAGES] = stage_differences(values)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Sources:
    """Where the values of a recipe come from."""

    file: Document
    folder: Path
    overrides: list[Override]

    def override_of(self, location: Location) -> Override | None:
        """Return the last override that set ``location`` or a section around it."""
        around = (one for one in reversed(self.overrides) if one.location == location[: len(one.location)])
        return next(around, None)

    def line_and_name(self, location: Location) -> tuple[int, str]:
        """Return the line in the file (0 for an override) and the place in words: `recipe.yaml:12`."""
        line, is_in_file = self.file.find(location)
        override = self.override_of(location)
        if override is None and not is_in_file:
            inside = (one for one in self.overrides if one.location[: len(location)] == location)
            override = next(inside, None)
        return (0, override.name) if override else (line, f"{self.file.name}:{line}")

    def start_of(self, location: Location, kind: PathKind) -> Path:
        """Return the folder that a relative path at ``location`` starts from."""
        is_output = kind in (PathKind.OUTPUT, PathKind.SHARED)
        # A packaged recipe starts from another one's run, and runs are not written into the package.
        is_earlier_run = kind is PathKind.START and is_packaged(Path(self.file.name))
        return Path.cwd() if is_output or is_earlier_run or self.override_of(location) else self.folder


def _read(path: Path) -> Document:
    try:
        document = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from error
    if not isinstance(document.values, dict):
        line, _ = document.find(())
        known = ", ".join(Recipe.model_fields)
        raise UserError(f"{path}:{line}: not a mapping; a recipe has the keys {known}")
    return document


def _user_error(sources: _Sources, errors: Sequence[tuple[Location, str]]) -> UserError:
    """Return an error with one line per error, in the order of the file."""
    placed = sorted((*sources.line_and_name(location), message) for location, message in errors)
    return UserError("\n".join(f"{name}: {message}" for _, name, message in placed))


def _missing_paths(
    values: Any, unresolved: Any, sources: _Sources, kinds: Collection[PathKind]
) -> Iterator[tuple[Location, str]]:
    """Yield location and message of each missing path of these kinds. unresolved: the values as written."""
    for location, kind in path_locations(values):
        path = Path(value_at(values, location))
        exists = path.is_dir() if location[-1] == "image_root" else path_exists(path)
        if kind not in kinds or not path.is_absolute() or exists:
            continue
        name = value_at(unresolved, location)
        hub_names = {PathKind.LANGUAGE: f"{name} with revision main", PathKind.TOWER: f"{ON_HUB}{name}"}
        is_in_recipe_folder = sources.start_of(location, kind) == sources.folder
        start = "the recipe's folder" if is_in_recipe_folder else "the current directory"
        problem = missing_path_message(
            path, name=name, on_hub=hub_names.get(kind), remedy=f"relative paths here start from {start}"
        )
        yield location, f"{location_text(location, values)}: {problem}"


# --- overrides ---


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line. name: what error messages call it."""

    name: str
    location: Location
    value: Any


def parse_override(text: str) -> Override:
    """Parse `train.max_steps=10` into its location and its value, read as YAML.

    Raises UserError if `=` or the key is missing, and for a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise UserError(f"override {text!r}: must be KEY=VALUE, such as train.max_steps=10")
    name = f"override {' '.join(text.split())}"
    location = tuple(int(step) if step.isdecimal() else step for step in steps)
    return Override(name, location, parse(value, name).values)


def apply_overrides(values: Any, overrides: Sequence[Override]) -> Any:
    """Return a copy of a recipe's plain values with the overrides applied in order.

    An override of one of two `ALTERNATIVES` replaces the other one of the file. If both are overridden,
    validation reports the conflict. An override of a common value also replaces those of stages.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override)
        clear_stage_values(values, override.location, is_set=override.value is not None)
    _remove_replaced(values, overrides)
    return values


def _apply(values: Any, override: Override) -> None:
    """Set one value, creating the mappings around it; unknown keys are left to validation."""
    *parents, last = override.location
    for depth, step in enumerate(parents):
        _check_step(values, step, override, depth)
        if isinstance(values, dict) and values.get(step) is None:
            values[step] = {}
        values = values[step]
    _check_step(values, last, override, len(parents))
    values[last] = override.value


def _check_step(values: Any, step: str | int, override: Override, depth: int) -> None:
    parent = ".".join(map(str, override.location[:depth]))
    if isinstance(values, list):
        if not isinstance(step, int) or step >= len(values):
            raise UserError(
                f"{override.name}: {parent} is a list of {len(values)}; "
                f"use an index below that, or give the whole list: {parent}=[...]"
            )
    elif not isinstance(values, dict):
        raise UserError(f"{override.name}: {parent} is a single value and has no keys; set {parent} itself")


def _remove_replaced(values: Any, overrides: Sequence[Override]) -> None:
    """Remove what an override gives in another unit: `train.epochs=3` replaces the file's max_steps."""
    for override in overrides:
        alternative = ALTERNATIVES.get(override.location[-2:])
        if alternative is None or override.value is None:
            continue
        replaced = (*override.location[:-2], *alternative)
        if not any(one.location == replaced[: len(one.location)] for one in overrides):
            value_at(values, replaced[:-1]).pop(replaced[-1], None)
