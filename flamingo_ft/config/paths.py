"""Where the paths of a recipe start.

One rule: what a recipe reads starts from the recipe's folder (backbones, weights, `model.init_from`, data, images); the
path of an override, and what a run writes, from the current directory. A name that may also be one on the Hub or
OpenCLIP's is a path as `flamingo_ft.hub.names` says.

Backbones and `model.init_from` started from the current directory in earlier versions: they are still found there, with a
warning.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flamingo_ft.config.document import Location
from flamingo_ft.config.schema import Recipe
from flamingo_ft.config.section import PathKind, section_of
from flamingo_ft.hub.local_paths import strip_local_path
from flamingo_ft.hub.names import LOCAL_DIR, local_language, local_start, local_tower, local_weights

MODELS = (PathKind.TOWER, PathKind.WEIGHTS, PathKind.LANGUAGE, PathKind.START)


def path_locations(
    values: Any, schema: type[BaseModel] = Recipe, parent: Location = ()
) -> Iterator[tuple[Location, PathKind]]:
    """Location and kind of every path, or name that may be one, among a recipe's plain values."""
    for name, field in schema.model_fields.items():
        value = values.get(name) if isinstance(values, Mapping) else None
        kind, section = kind_of(field), section_of(field.annotation)
        if kind is not None and isinstance(value, str):
            yield (*parent, name), kind
        elif section is not None and isinstance(value, list):
            for index, one in enumerate(value):
                yield from path_locations(one, section, (*parent, name, index))
        elif section is not None:
            yield from path_locations(value, section, (*parent, name))


def kind_of(field: FieldInfo) -> PathKind | None:
    """What the path of a key is for; None for a key that is no path."""
    return next(
        (one for one in _metadata(field.annotation, field.metadata) if isinstance(one, PathKind)), None
    )


def _metadata(annotation: Any, known: Sequence[Any] = ()) -> Iterator[Any]:
    """What a type is annotated with, the types that it is made of included."""
    yield from known
    yield from getattr(annotation, "__metadata__", ())
    for inside in get_args(annotation):
        yield from _metadata(inside)


def value_at(values: Any, location: Location) -> Any:
    """The value at `location`, or None where there is none."""
    for step in location:
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int):
            values = values[step]
        else:
            return None
    return values


def put_at(values: Any, location: Location, value: Any) -> None:
    """Set the value at a `location` that is there."""
    value_at(values, location[:-1])[location[-1]] = value


def resolve_paths(
    values: Any, start_of: Callable[[Location, PathKind], Path]
) -> Iterator[tuple[Location, str]]:
    """Make the paths among a recipe's plain values absolute, in place; what a run writes only loses its `~`.

    start_of: the folder that a relative path at a location starts from. Yields location and text of each warning.
    """
    for location, kind in list(path_locations(values)):
        text, start = value_at(values, location), start_of(location, kind)
        if kind in MODELS:
            path, warning = _model_path(kind, text, value_at(values, location[:-1]), start)
            if warning:
                yield location, warning
        else:
            path = start / os.path.expanduser(text)
        if kind is PathKind.OUTPUT:
            put_at(values, location, os.path.expanduser(text))
        elif path is not None:
            put_at(values, location, str(path.absolute()))


def _model_path(
    kind: PathKind, text: str, section: Mapping[str, Any], start: Path
) -> tuple[Path | None, str | None]:
    """The path that the name of a model stands for, None for a name elsewhere; and a warning where earlier versions took
    another path, or only they would have found it."""
    here, plain = Path.cwd(), os.path.expanduser(text.removeprefix(LOCAL_DIR))
    always = kind is not PathKind.START and plain.startswith(
        ("./", "../")
    )  # that started from the recipe's folder
    path, earlier = _as_path(kind, text, section, (start,) if always else (start, here)), here / plain
    if path is None or os.path.isabs(plain) or not earlier.exists() or start.samefile(here):
        return path, None
    rule = "relative paths in a recipe start from the recipe's folder"
    if path == earlier:
        return (
            path,
            f"{text} is not in {start}; using {earlier}, from the current directory, as earlier versions did: {rule}",
        )
    if kind is PathKind.START and not path.samefile(earlier):
        return path, f"using {path}; earlier versions used {earlier}: {rule}"
    return path, None


def _as_path(kind: PathKind, text: str, section: Mapping[str, Any], folders: Sequence[Path]) -> Path | None:
    if kind is PathKind.TOWER:
        pretrained = section.get("pretrained")
        return local_tower(text, pretrained if isinstance(pretrained, str) else None, folders)
    if kind is PathKind.LANGUAGE:
        revision = section.get("revision")
        return local_language(text, revision if isinstance(revision, str) else None, folders)
    return local_weights(text, folders) if kind is PathKind.WEIGHTS else local_start(text, folders)


def strip_recipe_paths(values: Any) -> Any:
    """A recipe's plain values with the last part alone of each absolute path, for others to see; text stays as it is."""
    values = copy.deepcopy(values)
    for location, _ in list(path_locations(values)):
        put_at(values, location, strip_local_path(value_at(values, location)))
    return values
