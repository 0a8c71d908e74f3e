"""What pydantic found wrong with a recipe -> lines that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from flamingo_ft.config.cross_field import cross_field_errors, cross_field_errors_beside, single_errors
from flamingo_ft.config.document import Location
from flamingo_ft.config.foreign_keys import FOREIGN_KEYS
from flamingo_ft.config.section import section_of

_WANTED = {
    "string_type": "text",
    "path_type": "a path",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "model_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge} or more",
}
_SHOWN_CHARACTERS = 60
_LISTED_KEYS = 12  # of one section; more are no help


def dotted(location: Location) -> str:
    """A location as recipes' users write it, on one line: `data.train.0.path`."""
    return " ".join(".".join(map(str, location)).split())


def problems(
    schema: type[BaseModel], error: ValidationError, values: Any = None
) -> list[tuple[Location, str]]:
    """Location and message of every problem; a misspelt required key is reported once, not also as missing.

    values: the plain values, to report those that contradict each other beside the ones that are wrong by themselves.
    """
    found = single_errors(error)
    meant = [
        keys
        for problem in found
        if problem["type"] == "extra_forbidden"
        for keys in _nearest_keys(schema, problem["loc"])
    ]
    own = [
        (problem["loc"], f"{dotted(problem['loc']) or 'the recipe'}: {_message(schema, problem)}")
        for problem in found
        if not (problem["type"] == "missing" and problem["loc"] in meant)
    ]
    wrong = [*(problem["loc"] for problem in found), *meant]  # a misspelt key's value is not known either
    between = cross_field_errors(error) or cross_field_errors_beside(schema, values, wrong)
    return own + [(location, f"{dotted(location) or 'the recipe'}: {reason}") for location, reason in between]


def _message(schema: type[BaseModel], problem: dict[str, Any]) -> str:
    kind, location = problem["type"], problem["loc"]
    if kind == "extra_forbidden":
        return _unknown_key(schema, location)
    if kind == "missing":
        return f"missing; {_remedy_for_missing(schema, location)}"
    if kind == "too_short":
        return "found an empty list; give at least one entry"
    found = _shown(problem["input"])
    if kind in _WANTED:
        unquoted = kind == "string_type" and isinstance(problem["input"], (int, float))
        wanted = _WANTED[kind].format(**problem.get("ctx", {}))
        return f"found {found}; want {wanted}{' (put it in quotes)' if unquoted else ''}"
    return problem["msg"]


def _shown(value: Any) -> str:
    """A value as it would stand in a recipe, shortened; containers by their kind."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _remedy_for_missing(schema: type[BaseModel], location: Location) -> str:
    section = _section_at(schema, location)
    fields = section.model_fields.items() if section else ()
    required = [name for name, field in fields if field.is_required()]
    return f"add it, with at least {', '.join(required)}" if required else "add it"


def _unknown_key(schema: type[BaseModel], location: Location) -> str:
    nearest = _nearest_keys(schema, location)
    if nearest:
        return f"unknown key; did you mean {' or '.join(map(dotted, nearest))}?"
    known = list(_section_at(schema, location[:-1]).model_fields)
    if len(known) > _LISTED_KEYS:
        return f"unknown key; see flamingo-ft recipes keys {dotted(location[:-1])}"
    return f"unknown key; known here are {', '.join(known)}"


def _nearest_keys(schema: type[BaseModel], location: Location) -> list[Location]:
    """Known keys that may be meant: of the same name, what another trainer calls so, spelt alike beside it or anywhere."""
    *parent, name = location
    everywhere = list(_keys(schema))
    same = [keys for keys in everywhere if keys[-1] == name]
    foreign = [keys for keys in everywhere if dotted(keys) == FOREIGN_KEYS.get(str(name).lower())]
    if same or foreign:
        return same or foreign
    beside = difflib.get_close_matches(str(name), _section_at(schema, tuple(parent)).model_fields, n=1)
    if beside:
        return [(*parent, beside[0])]
    alike = difflib.get_close_matches(str(name), [keys[-1] for keys in everywhere], n=1, cutoff=0.75)
    return [keys for keys in everywhere if keys[-1] in alike]


def _keys(schema: type[BaseModel], parent: Location = ()) -> Iterator[Location]:
    """Every key that a recipe may have, those of a list's entries under index 0."""
    for name, field in schema.model_fields.items():
        here = (*parent, name)
        yield here
        section = section_of(field.annotation)
        if section:
            yield from _keys(section, (*here, 0) if get_origin(field.annotation) is tuple else here)


def _section_at(schema: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The section that `location` leads to, or None where it leads to a plain value."""
    section: type[BaseModel] | None = schema
    for step in location:
        if not isinstance(step, int):  # a list's entries are of the section that its key named
            section = section_of(section.model_fields[step].annotation)
    return section
