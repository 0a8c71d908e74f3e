"""What is told to everybody names no place on this machine."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

_PLACE = re.compile(r"(?P<kind>local-dir:)?(?P<path>(/|~/)[^/\n][^\n]*)")


def without_places(value: Any) -> Any:
    """JSON's or YAML's values with the last part alone of each absolute path among them."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    found = _PLACE.fullmatch(value) if isinstance(value, str) else None
    return value if found is None else (found["kind"] or "") + PurePath(found["path"]).name
