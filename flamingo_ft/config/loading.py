"""A recipe's file, or its name, and overrides -> a validated `Recipe`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flamingo_ft.config.document import Document, Location, parse
from flamingo_ft.config.overrides import Override, apply_overrides, parse_override
from flamingo_ft.config.problems import dotted, problems
from flamingo_ft.config.schema import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import hub_name
from flamingo_ft.recipe_library import find_recipe

RECIPE_FILE = "resolved_recipe.yaml"
"""The recipe with every default, the first file that a run writes: a folder with it holds a run."""

_BACKBONES: tuple[Location, ...] = (
    ("model", "vision", "name"),
    ("model", "vision", "pretrained"),
    ("model", "language", "name"),
)


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, require: Collection[str] = ("data", "start")
) -> Recipe:
    """Read and check a recipe; its paths come back absolute, but for those that are written to.

    path_or_name: a YAML file, or the name of a packaged recipe.
    overrides: `key=value`, the value read as YAML, a list's entry by its index: `data.train.0.weight=2`.
        Paths in the file start from the file's folder, paths in overrides from the current directory.
    require: refuse files of `data`, image folders included, and a `start` (model.init_from) that are not there.

    Raises UserError with one line per problem, each naming the file and line, or the override, it comes from.
    """
    path = find_recipe(path_or_name)
    sources = _Sources(_read(path), path.parent, [parse_override(text) for text in overrides])
    values = apply_overrides(sources.file.values, sources.overrides)
    _make_absolute(values, sources)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _user_error(sources, problems(Recipe, error)) from None
    missing = list(_missing_start(recipe)) if "start" in require else []
    missing += _missing_files(recipe, sources) if "data" in require else ()
    if missing:
        raise _user_error(sources, missing)
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

    def base(self, location: Location) -> Path:
        """The folder that a relative path at `location` starts from."""
        return Path.cwd() if self.override_of(location) else self.folder


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


def _make_absolute(values: dict[str, Any], sources: _Sources) -> None:
    """Make the paths among the plain values absolute, in place; those that are written to only lose their `~`."""
    for location in _BACKBONES:
        if _is_explicit_path(_get(values, location)):
            _put_absolute(values, location, sources)
    for split in ("train", "eval"):
        entries = _get(values, ("data", split))
        for index in range(len(entries) if isinstance(entries, list) else 0):
            for key in ("path", "image_root"):
                _put_absolute(values, ("data", split, index, key), sources)
    start = _get(values, ("model", "init_from"))
    cache = _get(values, ("data", "cache", "folder"))
    if isinstance(cache, str):
        values["data"]["cache"]["folder"] = str(Path(cache).expanduser().absolute())
    for key in ("output_dir", "checkpoint_dir"):
        folder = _get(values, ("train", key))
        if isinstance(folder, str):
            values["train"][key] = str(Path(folder).expanduser())
    if isinstance(start, str) and hub_name(start) is None:  # another run's output_dir: from the current directory too, but kept for later ones
        values["model"]["init_from"] = str(Path(start).expanduser().absolute())


def _is_explicit_path(name: Any) -> bool:
    """Whether a backbone's name can only be a path; `org/name` may be one on the Hub."""
    return isinstance(name, str) and name.startswith(("./", "../", "~", "/"))


def _get(values: Any, location: Location) -> Any:
    """The value at `location`, or None where there is none."""
    for step in location:
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int):
            values = values[step]
        else:
            return None
    return values


def _put_absolute(values: dict[str, Any], location: Location, sources: _Sources) -> None:
    text = _get(values, location)
    if isinstance(text, str):
        path = sources.base(location) / Path(text).expanduser()
        _get(values, location[:-1])[location[-1]] = str(path.absolute())


def _missing_start(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    start = recipe.model.init_from
    if start is not None and hub_name(start) is None and not start.exists():
        yield ("model", "init_from"), f"model.init_from: found nothing at {start}; it starts from the current directory"


def _missing_files(recipe: Recipe, sources: _Sources) -> Iterator[tuple[Location, str]]:
    for split, entries in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, entry in enumerate(entries):
            location = ("data", split, index)
            if entry.path is not None and not is_there(entry.path):
                yield _not_there("file", entry.path, (*location, "path"), sources)
            if entry.image_root is not None and not entry.image_root.is_dir():
                yield _not_there("folder", entry.image_root, (*location, "image_root"), sources)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder, or one that fits where the name is a pattern."""
    return path.exists() or (any(mark in path.name for mark in "*?[") and any(path.parent.glob(path.name)))


def _not_there(kind: str, path: Path, location: Location, sources: _Sources) -> tuple[Location, str]:
    start = "the current directory" if sources.override_of(location) else "the recipe's folder"
    return location, f"{dotted(location)}: found no {kind} {path}; relative paths here start from {start}"
