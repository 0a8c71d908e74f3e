"""Cross-field validation errors beside those of single values.

Cross-field validation runs only where every value is valid. So invalid values are replaced by defaults, and errors that
may come from a replaced value are left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flamingo_ft.config.document import Location
from flamingo_ft.config.schema import CONTRADICTION
from flamingo_ft.config.section import section_of

_ROUNDS = 6  # a section put in for a missing one lacks keys of its own, down to the deepest


def cross_field_errors(error: ValidationError) -> list[tuple[Location, str]]:
    """Location and reason of every cross-field error that validation found."""
    found = (
        problem["ctx"]["found"]
        for problem in error.errors(include_url=False)
        if problem["type"] == CONTRADICTION
    )
    return next(found, [])


def single_errors(error: ValidationError) -> list[dict[str, Any]]:
    """pydantic's errors of single values. A list is not too short where its entries have errors of their own."""
    found = error.errors(include_url=False)
    return [
        one
        for one in found
        if one["type"] != CONTRADICTION and not (one["type"] == "too_short" and one["input"])
    ]


def cross_field_errors_beside(
    schema: type[BaseModel], values: Any, wrong: Sequence[Location]
) -> list[tuple[Location, str]]:
    """Cross-field errors among the valid values, as far as they can be determined. wrong: locations of the invalid ones."""
    if not isinstance(values, dict):
        return []
    values = copy.deepcopy(values)
    for _ in range(_ROUNDS):
        try:
            schema.model_validate(values)
        except ValidationError as error:
            if found := cross_field_errors(error):
                return [
                    (where, why)
                    for where, why in found
                    if not any(_concerns(where, why, one) for one in wrong)
                ]
            for problem in single_errors(error):
                _repair(schema, values, problem["loc"], problem["type"] == "missing")
        else:
            break
    return []


def _concerns(location: Location, reason: str, wrong: Location) -> bool:
    """Whether a cross-field error may come from a value that was replaced: one around or inside it, or named by it."""
    depth = min(len(location), len(wrong))
    return (
        location[:depth] == wrong[:depth]
        or re.search(rf"\b{re.escape(str(wrong[-1]))}\b", reason) is not None
    )


def _repair(schema: type[BaseModel], values: Any, location: Location, is_missing: bool) -> None:
    """Take an invalid value out, in place, or put a valid one where a required one is missing."""
    *way, last = location
    section: type[BaseModel] | None = schema
    for step in way:
        values = values[step]
        if section is not None and not isinstance(step, int):
            section = section_of(section.model_fields[step].annotation)
    if is_missing and section is not None:
        values[last] = _stand_in(section, last)
    elif isinstance(values, dict):
        values.pop(last, None)
    elif section is None:  # a list of plain values
        values.clear()
    else:
        values[last] = {}


def _stand_in(schema: type[BaseModel], name: str) -> Any:
    """A valid value for a required key: an empty section, which the next round fills, or text, or a number."""
    annotation = schema.model_fields[name].annotation
    section = section_of(annotation)
    if section is not None:
        return {} if section is annotation else [{}]
    return "x" if annotation in (str, Path) else 1
