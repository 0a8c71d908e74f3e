"""A recipe's file, or its name, and overrides -> a validated `Recipe`."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flamingo_ft.config.document import Document, Location, parse
from flamingo_ft.config.overrides import Override, apply_overrides, parse_override
from flamingo_ft.config.paths import path_locations, resolve_paths, value_at
from flamingo_ft.config.problems import dotted, problems
from flamingo_ft.config.schema import Recipe
from flamingo_ft.config.section import PathKind
from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import ON_HUB, missing_path_message

from .library import find_recipe, is_packaged

RECIPE_FILE = "resolved_recipe.yaml"
METRICS_FILE = "metrics.json"
"""The last file that a run writes: a folder that has it holds a finished run."""
"""The recipe with every default, the first file that a run writes: a folder with it holds a run."""

NEEDS = {
    "data": {PathKind.INPUT},
    "backbones": {PathKind.TOWER, PathKind.WEIGHTS, PathKind.LANGUAGE},
    "start": {PathKind.START},
}
"""What a recipe may be required to find, and the keys that name it."""


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, require: Collection[str] = tuple(NEEDS)
) -> Recipe:
    """Read and check a recipe; its paths come back absolute, but for those that are written to.

    path_or_name: a YAML file, or the name of a packaged recipe.
    overrides: `key=value`, the value read as YAML, a list's entry by its index: `data.train.0.weight=2`.
        Paths in the file start from the file's folder, paths in overrides from the current directory
        (`flamingo_ft.config.paths`).
    require: refuse files of `data`, image folders included, folders and files of `backbones`, and a `start`
        (model.init_from) that are not there.

    Raises UserError with one line per problem, each naming the file and line, or the override, it comes from. Warns of
    models that are found where only earlier versions looked.
    """
    path = find_recipe(path_or_name)
    sources = _Sources(_read(path), path.parent, [parse_override(text) for text in overrides])
    values = apply_overrides(sources.file.values, sources.overrides)
    given = copy.deepcopy(values)
    warned = list(resolve_paths(values, sources.start))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _user_error(sources, problems(Recipe, error, values)) from None
    lost = list(_missing_paths(values, given, sources, {kind for need in require for kind in NEEDS[need]}))
    if lost:
        raise _user_error(sources, lost)
    for location, warning in (
        warned if path.name != RECIPE_FILE else ()
    ):  # a run's own has what its recipe had
        warnings.warn(f"{sources.line_and_name(location)[1]}: {dotted(location)}: {warning}", stacklevel=2)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Sources:
    """Where the values of a recipe come from."""

    file: Document
    folder: Path
    overrides: list[Override]

    def override_of(self, location: Location) -> Override | None:
        """The last override that set `location` or a part of the recipe around it."""
        around = (one for one in reversed(self.overrides) if one.location == location[: len(one.location)])
        return next(around, None)

    def line_and_name(self, location: Location) -> tuple[int, str]:
        """The line in the file, and what to call the place: `recipe.yaml:12`, or an override (line 0)."""
        line, is_there = self.file.find(location)
        override = self.override_of(location)
        if override is None and not is_there:
            inside = (one for one in self.overrides if one.location[: len(location)] == location)
            override = next(inside, None)
        return (0, override.name) if override else (line, f"{self.file.name}:{line}")

    def start(self, location: Location, kind: PathKind) -> Path:
        """The folder that a relative path at `location` starts from."""
        # A packaged recipe starts from what another one wrote, and runs are not written into the package.
        is_written = kind in (PathKind.OUTPUT, PathKind.SHARED) or (
            kind is PathKind.START and is_packaged(Path(self.file.name))
        )
        return Path.cwd() if is_written or self.override_of(location) else self.folder


def _read(path: Path) -> Document:
    try:
        document = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from error
    if not isinstance(document.values, dict):
        line, _ = document.find(())
        known = ", ".join(Recipe.model_fields)
        raise UserError(f"{path}:{line}: found no mapping; a recipe has the keys {known}")
    return document


def _user_error(sources: _Sources, found: Sequence[tuple[Location, str]]) -> UserError:
    """One line per problem, in the order of the file."""
    placed = sorted((*sources.line_and_name(location), message) for location, message in found)
    return UserError("\n".join(f"{name}: {message}" for _, name, message in placed))


def _missing_paths(
    values: Any, given: Any, sources: _Sources, kinds: Collection[PathKind]
) -> Iterator[tuple[Location, str]]:
    """Location and message of each path of some kinds that leads nowhere. given: the values before they were resolved."""
    for location, kind in path_locations(values):
        path = Path(value_at(values, location))
        there = path.is_dir() if location[-1] == "image_root" else is_there(path)
        if kind not in kinds or not path.is_absolute() or there:
            continue
        name = value_at(given, location)
        on_hub = {PathKind.LANGUAGE: f"{name} with revision main", PathKind.TOWER: f"{ON_HUB}{name}"}.get(
            kind
        )
        start = (
            "the recipe's folder"
            if sources.start(location, kind) == sources.folder
            else "the current directory"
        )
        problem = missing_path_message(
            path, name=name, on_hub=on_hub, remedy=f"relative paths here start from {start}"
        )
        yield location, f"{dotted(location)}: {problem}"


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder, or one that fits where the name is a pattern."""
    return os.path.exists(path) or (
        any(mark in path.name for mark in "*?[") and any(path.parent.glob(path.name))
    )
