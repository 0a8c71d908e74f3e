"""pydantic's validation errors -> messages with a remedy, all of a recipe's errors at once.

pydantic runs cross-field validation only if every single value is valid. To report both kinds together,
invalid values are replaced by defaults, and cross-field errors that may come from a replaced value are
dropped.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flamingo_ft.config.recipe import CROSS_FIELD
from flamingo_ft.config.section import section_of
from flamingo_ft.config.stage_errors import at_written_locations, location_text
from flamingo_ft.config.stages import STAGE_SECTIONS, StageSection
from flamingo_ft.config.tables import FOREIGN_KEYS
from flamingo_ft.config.yaml_document import Location, dotted
from flamingo_ft.formatting import shorten

_EXPECTED = {  # pydantic's type of error -> what the value has to be
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
_MAX_VALUE_CHARACTERS = 60
_MAX_LISTED_KEYS = 12  # a section with more keys is not listed in a message
_MAX_ROUNDS = 6  # repair passes: filling in a section may reveal missing keys inside it

Errors = list[tuple[Location, str]]


def validation_errors(
    schema: type[BaseModel], error: ValidationError, values: Any = None, written: Any = None
) -> Errors:
    """Return location and message of every error; a misspelt required key is not also reported as missing.

    values: the plain values that were validated; they allow for cross-field errors beside errors of single
    values. written: the same values before `merge_stages`.
    """
    single = _single_value_errors(error)
    unknown = [one["loc"] for one in single if one["type"] == "extra_forbidden"]
    intended = [keys for location in unknown for keys in _nearest_keys(schema, location)]
    errors = [
        (one["loc"], _message(schema, one))
        for one in single
        if not (one["type"] == "missing" and one["loc"] in intended)
    ]
    invalid = [*(one["loc"] for one in single), *intended]  # the value of a misspelt key is unknown, too
    errors = at_written_locations(errors, written)
    errors += _cross_field_errors(error) or _cross_field_errors_beside(schema, values, invalid)
    return [
        (location, f"{location_text(location, values) or 'the recipe'}: {message}")
        for location, message in errors
    ]


def _single_value_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return pydantic's errors of single values, except "too short" for a list with invalid entries."""
    return [
        one
        for one in error.errors(include_url=False)
        if one["type"] != CROSS_FIELD and not (one["type"] == "too_short" and one["input"])
    ]


def _cross_field_errors(error: ValidationError) -> Errors:
    details = error.errors(include_url=False)
    return next((one["ctx"]["errors"] for one in details if one["type"] == CROSS_FIELD), [])


# --- messages ---


def _message(schema: type[BaseModel], error: ErrorDetails) -> str:
    kind, location = error["type"], error["loc"]
    if kind == "extra_forbidden":
        return _unknown_key(schema, location)
    if kind == "missing":
        return f"missing; {_remedy_for_missing(schema, location)}"
    if kind == "too_short":
        return "got an empty list; give at least one entry"
    if kind not in _EXPECTED:
        return error["msg"]
    expected = _EXPECTED[kind].format(**error.get("ctx", {}))
    is_unquoted = kind == "string_type" and isinstance(error["input"], (int, float))
    hint = " (put it in quotes)" if is_unquoted else ""
    if kind == "tuple_type" and isinstance(error["input"], str):
        hint = f" such as {_as_list(schema, location, error['input'])}"
    return f"must be {expected}{hint}, got {_value_text(error['input'])}"


def _as_list(schema: type[BaseModel], location: Location, value: str) -> str:
    """Return a list with one value as a recipe has it; a source of data is a mapping."""
    section = _section_at(schema, (*location, 0))
    return f"[{{path: {value}}}]" if section is not None and "path" in section.model_fields else f"[{value}]"


def _value_text(value: Any) -> str:
    """Return a value as it would be written in a recipe, shortened; containers as their type only."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shorten(repr(value), _MAX_VALUE_CHARACTERS)


def _remedy_for_missing(schema: type[BaseModel], location: Location) -> str:
    section = _section_at(schema, location)
    fields = section.model_fields.items() if section else ()
    required = [name for name, field in fields if field.is_required()]
    return f"add it, with at least {', '.join(required)}" if required else "add it"


def _unknown_key(schema: type[BaseModel], location: Location) -> str:
    nearest = _nearest_keys(schema, location)
    if nearest:
        return f"unknown key; did you mean {' or '.join(map(dotted, nearest))}?"
    known = _key_names(schema, location[:-1])
    if len(known) > _MAX_LISTED_KEYS:
        return f"unknown key; see flamingo-ft recipes keys {dotted(location[:-1])}"
    return f"unknown key; the keys here are {', '.join(known)}"


def _nearest_keys(schema: type[BaseModel], location: Location) -> list[Location]:
    """Return the keys that an unknown key may stand for.

    These are all keys of the same name elsewhere, the key known by that name in another trainer, or the
    closest spelling: in the same section, then anywhere.
    """
    *parent, name = location
    everywhere = list(recipe_locations(schema))
    same = [keys for keys in everywhere if keys[-1] == name]
    foreign = [keys for keys in everywhere if dotted(keys) == FOREIGN_KEYS.get(str(name).lower())]
    if same or foreign:
        return same or foreign
    beside = difflib.get_close_matches(str(name), _key_names(schema, tuple(parent)), n=1)
    if beside:
        return [(*parent, beside[0])]
    similar = difflib.get_close_matches(str(name), [str(keys[-1]) for keys in everywhere], n=1, cutoff=0.75)
    return [keys for keys in everywhere if keys[-1] in similar]


def recipe_locations(schema: type[BaseModel], parent: Location = ()) -> Iterator[Location]:
    """Yield the location of every key that a recipe may have; entries of a list are under index 0.

    The sections of a stage have the keys of the recipe's own, which are not repeated.
    """
    for name, field in schema.model_fields.items():
        here = (*parent, name)
        yield here
        section = section_of(field.annotation)
        is_repeated = schema is StageSection and name in STAGE_SECTIONS
        if section and not is_repeated:
            yield from recipe_locations(
                section, (*here, 0) if get_origin(field.annotation) is tuple else here
            )


def _key_names(schema: type[BaseModel], location: Location) -> list[str]:
    section = _section_at(schema, location)
    return [] if section is None else list(section.model_fields)


def _section_at(schema: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """Return the section at ``location``, or None where there is a plain value."""
    section: type[BaseModel] | None = schema
    for step in location:
        if section is not None and not isinstance(step, int):  # an index stays in the section of its list
            section = section_of(section.model_fields[step].annotation)
    return section


# --- cross-field errors beside errors of single values ---


def _cross_field_errors_beside(schema: type[BaseModel], values: Any, invalid: Sequence[Location]) -> Errors:
    """Return the cross-field errors among the valid values. invalid: locations of the others."""
    if not isinstance(values, dict):
        return []
    values = copy.deepcopy(values)
    for _ in range(_MAX_ROUNDS):
        try:
            schema.model_validate(values)
            return []
        except ValidationError as error:
            if errors := _cross_field_errors(error):
                return [
                    (location, message)
                    for location, message in errors
                    if not any(_depends_on(location, message, one) for one in invalid)
                ]
            for one in _single_value_errors(error):
                _repair(schema, values, one["loc"], is_missing=one["type"] == "missing")
    return []


def _depends_on(location: Location, message: str, invalid: Location) -> bool:
    """Whether a cross-field error may come from a replaced value.

    Such a value is around it, inside it, or named in its message.
    """
    depth = min(len(location), len(invalid))
    is_named = re.search(rf"\b{re.escape(str(invalid[-1]))}\b", message) is not None
    return location[:depth] == invalid[:depth] or is_named


def _repair(schema: type[BaseModel], values: Any, location: Location, is_missing: bool) -> None:
    """Remove an invalid value in place, or insert a valid one for a required key that is missing."""
    *parents, last = location
    section: type[BaseModel] | None = schema
    for step in parents:
        if isinstance(values[step], str):  # one value in place of a list
            last = step
            break
        values = values[step]
        if section is not None and not isinstance(step, int):
            section = section_of(section.model_fields[step].annotation)
    if is_missing and section is not None:
        values[last] = _placeholder(section, str(last))
    elif isinstance(values, dict):
        values.pop(last, None)
    elif section is None:  # a list of plain values
        values.clear()
    else:
        values[last] = {}


def _placeholder(section: type[BaseModel], name: str) -> Any:
    """Return a valid value for a required key.

    It is text, a number, or an empty section that the next pass fills.
    """
    annotation = section.model_fields[name].annotation
    inner = section_of(annotation)
    if inner is not None:
        return {} if inner is annotation else [{}]
    return "x" if annotation in (str, Path) else 1
