"""Parametrization that keeps a case or two of each law in the plain tests and marks the others slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Return a parameter, or several for one test, that runs with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def slow_except(plain: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return ``values`` as parameters, all of them slow but those in ``plain``."""
    kept = [*plain]
    return [value if value in kept else slow(value) for value in values]
