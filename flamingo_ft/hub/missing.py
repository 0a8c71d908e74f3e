"""Paths that lead nowhere: the error, with the path that was probably meant."""

from __future__ import annotations

import difflib
import os
from itertools import islice
from pathlib import Path, PurePath

from flamingo_ft.errors import UserError

from .names import FILE_SUFFIXES, NAME, hub_name

MOST_ENTRIES = 10_000  # of one folder that are compared
ALIKE = 0.7  # smallest similarity of a suggestion, as difflib measures it


def existing(place: str | Path) -> Path:
    """The path ``place``. UserError where it leads nowhere, naming the existing path that is spelt most like it."""
    path = Path(os.path.expanduser(place))
    if str(place) and os.path.exists(path):
        return path
    raise UserError(missing(place))


def refuse_missing(place: str | Path) -> None:
    """Raise UserError where ``place`` is a path, and not a name on the Hub, that leads nowhere."""
    if hub_name(place) is None:
        existing(place)


def missing(
    place: str | Path,
    kind: str | None = None,
    *,
    name: str | None = None,
    on_hub: str | None = None,
    remedy: str = "check the path",
) -> str:
    """The text of the error for a path that leads nowhere.

    kind: file or folder, by default as the suffix says. name: what was given for ``place``, where that is another. on_hub:
    how to name the repository on the Hub that it may mean, by default with a revision. remedy: what to do where no
    existing path is spelt alike.
    """
    text = str(place)
    kind = kind or ("file" if PurePath(text).suffix.lower() in FILE_SUFFIXES else "folder")
    nearest = None if set("*?[") & set(text) else nearest_path(text)
    remedy = f"did you mean {nearest}?" if nearest else remedy
    name = text if name is None else name
    hint = f" (on the Hub: {on_hub or f'{name}@main'})" if NAME.fullmatch(name) else ""
    return f"no {kind} {text or repr(text)}; {remedy}{hint}"


def nearest_path(place: str | Path) -> Path | None:
    """The existing path that is spelt most like ``place``, component by component; None where a component has none."""
    path = Path(os.path.expanduser(str(place).replace("\\", "/")))
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        name = part if os.path.exists(found / part) else _nearest_entry(found, part)
        if name is None:
            return None
        found /= name
    return found if path.parts else None


def _nearest_entry(folder: Path, name: str) -> str | None:
    """The entry of a folder that is spelt most like ``name``, in upper or lower case."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name.lower(): entry.name for entry in islice(entries, MOST_ENTRIES)}
    except OSError:  # not a folder, or not readable: there is nothing to suggest
        return None
    alike = difflib.get_close_matches(name.lower(), names, n=1, cutoff=ALIKE)
    return names[alike[0]] if alike else None
