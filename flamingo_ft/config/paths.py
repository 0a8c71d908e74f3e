"""What the relative paths of a recipe are relative to.

What a recipe reads (backbones, weights, `model.init_from`, data, images) is relative to the recipe's folder.
What a run writes, and any path in an override, is relative to the current directory. A name that could also
be a repository on the Hub or an architecture of OpenCLIP is a path under the conditions in
`flamingo_ft.hub.names`.

In earlier versions backbones and `model.init_from` were relative to the current directory. They are still
found there, with a warning.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flamingo_ft.config.metric_names import is_user_metric
from flamingo_ft.config.recipe import Recipe
from flamingo_ft.config.section import PathKind, section_of
from flamingo_ft.config.yaml_document import Location
from flamingo_ft.hub.names import (
    LOCAL_DIR,
    local_language,
    local_start,
    local_tower,
    local_weights,
    strip_local_path,
)

MODEL_KINDS = (PathKind.TOWER, PathKind.WEIGHTS, PathKind.LANGUAGE, PathKind.START)


def path_locations(
    values: Any, schema: type[BaseModel] = Recipe, parent: Location = ()
) -> Iterator[tuple[Location, PathKind]]:
    """Yield location and kind of every path, or name that may be one, among a recipe's plain values."""
    for name, kind, section in _keys_with_paths(schema):
        value = values.get(name) if isinstance(values, Mapping) else None
        if kind is not None:
            yield from ((location, kind) for location in _path_texts(value, kind, (*parent, name)))
        elif section is not None and isinstance(value, list):
            for index, entry in enumerate(value):
                yield from path_locations(entry, section, (*parent, name, index))
        elif section is not None:
            yield from path_locations(value, section, (*parent, name))


@cache
def _keys_with_paths(schema: type[BaseModel]) -> list[tuple[str, PathKind | None, type[BaseModel] | None]]:
    """Return name, kind of path and section of each key that is a path or a section."""
    keys = ((name, path_kind(key), section_of(key.annotation)) for name, key in schema.model_fields.items())
    return [(name, kind, section) for name, kind, section in keys if kind or section]


def _path_texts(value: Any, kind: PathKind, location: Location) -> Iterator[Location]:
    """Yield the location of each path in a key's value; the name of a metric is one if it names a file."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _path_texts(entry, kind, (*location, index))
    elif isinstance(value, str) and (kind is not PathKind.METRIC or is_user_metric(value)):
        yield location


def path_kind(field: FieldInfo) -> PathKind | None:
    """Return what the path of a key is used for; None for a key that is not a path."""
    metadata = _metadata(field.annotation, field.metadata)
    return next((one for one in metadata if isinstance(one, PathKind)), None)


def _metadata(annotation: Any, known: Sequence[Any] = ()) -> Iterator[Any]:
    """Yield what a type, and each type inside it, is annotated with."""
    yield from known
    yield from getattr(annotation, "__metadata__", ())
    for inside in get_args(annotation):
        yield from _metadata(inside)


def value_at(values: Any, location: Location) -> Any:
    """Return the value at ``location``, or None for a location that does not exist."""
    for step in location:
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int):
            values = values[step]
        else:
            return None
    return values


def set_value_at(values: Any, location: Location, value: Any) -> None:
    """Set the value at an existing ``location``."""
    value_at(values, location[:-1])[location[-1]] = value


def path_exists(path: Path) -> bool:
    """Whether a file or folder exists, or one that matches if the name is a pattern."""
    is_pattern = any(mark in path.name for mark in "*?[")
    return os.path.exists(path) or (is_pattern and any(path.parent.glob(path.name)))


def resolve_paths(
    values: Any, start_of: Callable[[Location, PathKind], Path]
) -> Iterator[tuple[Location, str]]:
    """Make the paths among a recipe's plain values absolute, in place. In output paths, only `~` is expanded.

    start_of: returns the folder that a relative path at a location starts from. Yields location and text of
    each warning.
    """
    for location, kind in list(path_locations(values)):
        text, start = value_at(values, location), start_of(location, kind)
        if kind is PathKind.OUTPUT:
            set_value_at(values, location, os.path.expanduser(text))
            continue
        path: Path | None = start / os.path.expanduser(text)
        if kind in MODEL_KINDS:
            path, warning = _resolve_model(kind, text, value_at(values, location[:-1]), start)
            if warning:
                yield location, warning
        if path is not None:
            set_value_at(values, location, str(path.absolute()))


def _resolve_model(
    kind: PathKind, text: str, section: Mapping[str, Any], start: Path
) -> tuple[Path | None, str | None]:
    """Return the path of a model, or None for a name that is not a path, plus a deprecation warning or None.

    The warning is for a path that differs from what earlier versions used, or that only they looked for.
    """
    here, plain = Path.cwd(), os.path.expanduser(text.removeprefix(LOCAL_DIR))
    # unchanged from earlier versions
    is_relative_to_recipe = kind is not PathKind.START and plain.startswith(("./", "../"))
    path = _local_path(kind, text, section, (start,) if is_relative_to_recipe else (start, here))
    earlier = here / plain
    if path is None or os.path.isabs(plain) or not earlier.exists() or start.samefile(here):
        return path, None
    rule = "relative paths in a recipe start from the recipe's folder"
    if path == earlier:
        fallback = f"using {earlier}, from the current directory, as earlier versions did"
        return path, f"{text} is not in {start}; {fallback}: {rule}"
    if kind is PathKind.START and not path.samefile(earlier):
        return path, f"using {path}; earlier versions used {earlier}: {rule}"
    return path, None


def _local_path(
    kind: PathKind, text: str, section: Mapping[str, Any], folders: Sequence[Path]
) -> Path | None:
    if kind is PathKind.TOWER:
        pretrained = section.get("pretrained")
        return local_tower(text, pretrained if isinstance(pretrained, str) else None, folders)
    if kind is PathKind.LANGUAGE:
        revision = section.get("revision")
        return local_language(text, revision if isinstance(revision, str) else None, folders)
    return local_weights(text, folders) if kind is PathKind.WEIGHTS else local_start(text, folders)


def strip_recipe_paths(values: Any) -> Any:
    """Return a copy of a recipe's plain values in which only the last part of each absolute path is left."""
    values = copy.deepcopy(values)
    for location, _ in list(path_locations(values)):
        set_value_at(values, location, strip_local_path(value_at(values, location)))
    return values
