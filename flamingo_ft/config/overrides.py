"""`key=value` on the command line -> a value in the recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config.document import Location, parse
from flamingo_ft.errors import UserError

# Keys that set the same thing in different units; a recipe has at most one of each pair.
ALTERNATIVES: tuple[tuple[Location, Location], ...] = (
    (("train", "max_steps"), ("train", "epochs")),
    (("train", "warmup_steps"), ("train", "warmup_ratio")),
)


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
    """A copy of the recipe's plain values with the overrides put in, later ones over earlier ones.

    An override of one of two `ALTERNATIVES` replaces the other one of the file; two overrides are left to the schema.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _put(values, override)
    _drop_replaced(values, overrides)
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


def _drop_replaced(values: Any, overrides: Sequence[Override]) -> None:
    """Remove from the file's values what an override gives in another unit: `train.epochs=3` replaces max_steps."""
    for pair in ALTERNATIVES:
        for given, other in (pair, pair[::-1]):
            is_given = any(one.location == given and one.value is not None for one in overrides)
            is_overridden = any(one.location == other[: len(one.location)] for one in overrides)
            if is_given and not is_overridden:
                values[other[0]].pop(other[1], None)
