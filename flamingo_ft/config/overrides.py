"""`key=value` on the command line -> a value in the recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config.document import Location, parse
from flamingo_ft.errors import UserError


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line."""

    name: str
    """What errors call it."""
    location: Location
    value: Any


def parse_override(text: str) -> Override:
    """`train.max_steps=10` -> its location and its value, read as YAML.

    Raises UserError without `=`, without a key, and for a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise UserError(f"override {text!r}: want KEY=VALUE, such as train.max_steps=10")
    name = f"override {' '.join(text.split())}"
    location = tuple(int(step) if step.isdecimal() else step for step in steps)
    return Override(name, location, parse(value, name).values)


def apply_overrides(values: Any, overrides: Sequence[Override]) -> Any:
    """A copy of the recipe's plain values with the overrides put in, later ones over earlier ones."""
    values = copy.deepcopy(values)
    for override in overrides:
        _put(values, override)
    return values


def _put(values: Any, override: Override) -> None:
    """Set one value, making the mappings on the way to it; the schema judges the result."""
    *way, last = override.location
    for depth, step in enumerate(way):
        _check_step(values, step, override, depth)
        if isinstance(values, dict) and values.get(step) is None:
            values[step] = {}
        values = values[step]
    _check_step(values, last, override, len(way))
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
