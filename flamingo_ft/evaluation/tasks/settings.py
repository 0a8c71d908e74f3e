"""The keys of a recipe's ``eval`` section that apply to a task, given as ``KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_ft.config.loading import parse_override
from flamingo_ft.errors import UserError

KEYS = ("eval.batch_size", "eval.max_samples")


@dataclass(frozen=True)
class TaskSettings:
    """batch_size: prompts answered together; None: the predictor's. max_samples: examples; None: all."""

    batch_size: int | None = None
    max_samples: int | None = None


def task_settings(overrides: Sequence[str]) -> TaskSettings:
    """Return the settings. Raises UserError for another key, and for a value that is not 1 or more."""
    values = {}
    for override in overrides:
        parsed = parse_override(override)
        key = ".".join(map(str, parsed.location))
        if key not in KEYS:
            raise UserError(f"override {key}: a task does not use it; it uses {', '.join(KEYS)}")
        if not isinstance(parsed.value, int) or isinstance(parsed.value, bool) or parsed.value < 1:
            raise UserError(f"override {key}: must be 1 or more, got {parsed.value}; correct it")
        values[key.removeprefix("eval.")] = parsed.value
    return TaskSettings(**values)
