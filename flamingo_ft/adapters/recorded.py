"""Where the local files that an adapter records lie now: where they lay in training, or beside the adapter.

A run records absolute paths, so its adapter loads from any directory. Runs of earlier versions recorded what the recipe
said, relative to the directory that they were started in: that may be any folder above the adapter.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flamingo_ft.backbones.tower_source import is_architecture
from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import LOCAL_DIR, NANO, ON_HUB, is_model_folder, looks_like_path
from flamingo_ft.model import FlamingoConfig


def places_of(folder: Path, recorded: str) -> list[Path]:
    """Where to look for a path that the adapter in ``folder`` records, the likeliest first."""
    path, adapter = Path(os.path.expanduser(recorded.removeprefix(LOCAL_DIR))), folder.resolve()
    above = [] if path.is_absolute() else [parent / path for parent in adapter.parents]
    return list(dict.fromkeys([path, adapter.parent / path.name, *above]))


def with_places(folder: Path, config: FlamingoConfig) -> FlamingoConfig:
    """A copy of an adapter's configuration, with the absolute paths of local backbones as they are now.

    Raises UserError, with the places that were looked at, for a folder or file that is in none of them.
    """
    config = copy.deepcopy(config)
    config.backbones = {
        part: {**source, **_located(folder, part, source)} for part, source in config.backbones.items()
    }
    return config


def _located(folder: Path, part: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a backbone's record that are different now."""
    found = {}
    if _is_folder(part, source):
        place = _find(folder, part, source["name"], is_model_folder)
        found = {"name": str(place.absolute()), "revision": None}
    if _is_file(part, source):
        found["pretrained"] = str(_find(folder, part, source["pretrained"], os.path.isfile).absolute())
    return found


def _is_folder(part: str, source: Mapping[str, Any]) -> bool:
    """Whether a backbone is a folder on this machine. What came from the Hub is recorded with its commit."""
    name = source["name"]
    if name == NANO or name.startswith(ON_HUB):
        return False
    if looks_like_path(name):
        return True
    return source.get("revision") is None and not (part == "vision" and is_architecture(name))


def _is_file(part: str, source: Mapping[str, Any]) -> bool:
    """Whether the weights of a tower are a file on this machine."""
    return part == "vision" and bool(source.get("pretrained")) and looks_like_path(source["pretrained"])


def _find(folder: Path, part: str, recorded: str, counts: Callable[[Path], bool]) -> Path:
    places = places_of(folder, recorded)
    found = next((place for place in places if counts(place)), None)
    if found is None:
        looked = ", ".join(str(place.absolute()) for place in places)
        raise UserError(
            f"{folder}: {part} backbone {recorded} is not there (looked at {looked}); put it back, or beside the adapter"
        )
    return found
