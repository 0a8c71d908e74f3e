"""Parametrization that keeps a case or two of each law in the plain tests and marks the others slow."""

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
