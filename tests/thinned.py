"""Parametrization in which the first value is a plain test, and those that repeat its law are slow ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(value: Any, *, id: str | None = None) -> Any:
    """Return a parameter whose tests run with the slow ones."""
    return pytest.param(value, marks=pytest.mark.slow, id=id)


def slow_except(plain: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return ``values`` as parameters, all of them slow but those in ``plain``."""
    kept = [*plain]
    return [value if value in kept else slow(value) for value in values]
