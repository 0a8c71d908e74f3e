"""Remove directories of this machine from what is published: of an absolute path only the last component
stays.

Paths are recognized by their keys. Free text is never changed: a prompt may begin with a slash.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePath
from typing import Any

PATH_KEYS = ("path", "name_or_path", "_name_or_path", "base_model_name_or_path")
PATH_SUFFIXES = ("_path", "_file", "_dir", "_folder")
BACKBONE_KEYS = ("name", "pretrained")  # keys of an entry of `backbones` in a Flamingo's configuration

_ABSOLUTE_PATH = re.compile(r"(?P<prefix>local-dir:)?(?P<path>(/|~/)[^/\n][^\n]*)")


def strip_local_path(value: Any) -> Any:
    """Return the last component of an absolute path, or of each in a list; other values unchanged."""
    if isinstance(value, list):
        return [strip_local_path(entry) for entry in value]
    match = _ABSOLUTE_PATH.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else (match["prefix"] or "") + PurePath(match["path"]).name


def strip_local_paths(values: Any, keys: Collection[str] = ()) -> Any:
    """Return JSON values with the absolute paths under the known keys, and under ``keys``, stripped."""
    if isinstance(values, list):
        return [strip_local_paths(entry, keys) for entry in values]
    if not isinstance(values, dict):
        return values
    return {name: _strip_entry(name, value, keys) for name, value in values.items()}


def _strip_entry(name: str, value: Any, keys: Collection[str]) -> Any:
    if name == "backbones" and isinstance(value, dict):
        return {part: strip_local_paths(record, BACKBONE_KEYS) for part, record in value.items()}
    if name in PATH_KEYS or name in keys or name.endswith(PATH_SUFFIXES):
        value = strip_local_path(value)
    return strip_local_paths(value, keys)
