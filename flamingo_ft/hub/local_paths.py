"""Paths of this machine in what is shown to everybody: only the last part of each stays.

They are known by their keys. Text is never changed, whatever it looks like: a prompt may begin with a slash.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePath
from typing import Any

PATH_KEYS = ("path", "name_or_path", "_name_or_path", "base_model_name_or_path")
PATH_ENDINGS = ("_path", "_file", "_dir", "_folder")
BACKBONE_KEYS = ("name", "pretrained")  # of an entry of `backbones` in a Flamingo's configuration

_PLACE = re.compile(r"(?P<kind>local-dir:)?(?P<path>(/|~/)[^/\n][^\n]*)")


def strip_local_path(value: Any) -> Any:
    """The last part of an absolute path; of a list, that of each entry. Anything else stays as it is."""
    if isinstance(value, list):
        return [strip_local_path(one) for one in value]
    found = _PLACE.fullmatch(value) if isinstance(value, str) else None
    return value if found is None else (found["kind"] or "") + PurePath(found["path"]).name


def strip_local_paths(values: Any, keys: Collection[str] = ()) -> Any:
    """JSON values with the last part alone of the absolute paths under known keys, and under ``keys``."""
    if isinstance(values, list):
        return [strip_local_paths(one, keys) for one in values]
    if not isinstance(values, dict):
        return values
    return {name: _stripped(name, one, keys) for name, one in values.items()}


def _stripped(name: str, value: Any, keys: Collection[str]) -> Any:
    if name == "backbones" and isinstance(value, dict):
        return {part: strip_local_paths(record, BACKBONE_KEYS) for part, record in value.items()}
    if name in PATH_KEYS or name in keys or name.endswith(PATH_ENDINGS):
        value = strip_local_path(value)
    return strip_local_paths(value, keys)
