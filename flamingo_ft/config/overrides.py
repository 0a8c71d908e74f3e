"""`key=value` on the command line -> a value in the recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config.yaml_document import Location, parse
from flamingo_ft.errors import UserError

# Keys that give the same quantity in different units; a recipe has at most one of each pair.
ALTERNATIVES: tuple[tuple[Location, Location], ...] = (
    (("train", "max_steps"), ("train", "epochs")),
    (("train", "warmup_steps"), ("train", "warmup_ratio")),
)


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
    validation reports the conflict.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override)
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
    for pair in ALTERNATIVES:
        for key, alternative in (pair, pair[::-1]):
            is_set = any(one.location == key and one.value is not None for one in overrides)
            is_overridden = any(one.location == alternative[: len(one.location)] for one in overrides)
            if is_set and not is_overridden:
                values[alternative[0]].pop(alternative[1], None)
