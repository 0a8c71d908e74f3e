"""Distinguish paths on this machine from names on the Hub, and strip local paths from what is published.

Names on the Hugging Face Hub are ``org/name`` and ``org/name@revision``. A name is a path if

- it exists,
- it is written like a path (`looks_like_path`), or
- its first component exists: ``runs/quickstrt`` beside a folder ``runs`` is a mistyped path, not the
  repository of a user called "runs".

An explicit revision always means the Hub, unless the name exists as a path.

Of an absolute path, only the last component is published. Paths are recognized by their keys. Free text is
never changed: a prompt may begin with a slash.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from flamingo_ft.errors import UserError

from .weight_files import CONFIG_FILE, OPEN_CLIP_CONFIG_FILE

NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-][\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")

NANO = "nano"  # the name of both backbones that come with the package
ON_HUB = "hf-hub:"  # OpenCLIP's prefix for a tower on the Hub
TIMM = "timm/"  # prefix of a timm model, whatever folders there are
LOCAL_DIR = "local-dir:"  # OpenCLIP's prefix for a tower in a folder
FILE_SUFFIXES = {
    ".bin", ".ckpt", ".csv", ".gguf", ".json", ".jsonl", ".npz", ".parquet", ".pt", ".pth", ".safetensors",
    ".tar", ".yaml", ".yml", ".zip",
}  # fmt: skip
HERE = (Path(),)  # relative paths start from the current directory

MAX_ENTRIES = 10_000  # entries of one folder that are compared with a mistyped name
MIN_SIMILARITY = 0.7  # of a suggestion, as difflib measures it


@dataclass(frozen=True)
class HubName:
    """A repository and a commit, branch or tag of it; ``revision`` None is the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_name(place: str | Path) -> HubName | None:
    """Return the repository that ``place`` names on the Hub; None for a path."""
    match = NAME.fullmatch(str(place))
    if match is None or local_path(str(place)) is not None:
        return None
    return HubName(match["repository"], match["revision"])


def looks_like_path(name: str) -> bool:
    """Return whether ``name`` looks like a path: ``./x``, ``/x``, ``~/x``, ``x/``, ``a/b/c``, ``x/y.pt``."""
    on_hub = NAME.fullmatch(name)
    if on_hub is not None:
        return on_hub["revision"] is None and PurePath(name).suffix.lower() in FILE_SUFFIXES
    return (
        name.startswith((".", "/", "~", LOCAL_DIR))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
        or PurePath(name).suffix.lower() in FILE_SUFFIXES
    )


def local_path(
    name: str, folders: Sequence[Path] = HERE, accepts: Callable[[Path], bool] = os.path.exists
) -> Path | None:
    """Return the path that ``name`` means, which may not exist; None if it is not a path.

    Args:
        folders: where a relative path may start, the preferred one first.
        accepts: which existing paths a name that does not look like a path may mean.
    """
    text = os.path.expanduser(name.removeprefix(LOCAL_DIR))
    if not text:
        return None
    places = [folder / text for folder in folders]
    existing = next((place for place in places if os.path.exists(place)), None)
    if looks_like_path(name):
        return existing or places[0]
    if existing is not None and accepts(existing):
        return existing
    on_hub = NAME.fullmatch(name)
    if "/" not in text or (on_hub is not None and on_hub["revision"]):
        return None
    first = Path(text).parts[0]
    return existing or next(
        (place for place, folder in zip(places, folders, strict=True) if os.path.isdir(folder / first)), None
    )


def local_start(name: str, folders: Sequence[Path] = HERE) -> Path | None:
    """Return the path of a model to start from; None for a repository on the Hub."""
    path = local_path(name, folders)
    return folders[0] / os.path.expanduser(name) if path is None and NAME.fullmatch(name) is None else path


def local_language(name: str, revision: str | None, folders: Sequence[Path] = HERE) -> Path | None:
    """Return the folder of a language model; None for the nano one and for a repository on the Hub.

    A name with a commit is always on the Hub, so that what an adapter records means the same in every
    directory.
    """
    if name == NANO:
        return None
    path = local_path(name, folders, is_model_folder)
    if path is None or revision is None or looks_like_path(name):
        return path
    return path if path.is_dir() and not COMMIT.fullmatch(revision) else None


def local_tower(name: str, pretrained: str | None, folders: Sequence[Path] = HERE) -> Path | None:
    """Return the folder of a vision tower; None for nano, a Hub repository, timm/NAME or an architecture.

    With ``pretrained``, a plain name is an architecture, even beside a folder of the same name.
    """
    if name == NANO or name.startswith((ON_HUB, TIMM)) or (pretrained and not looks_like_path(name)):
        return None
    return local_path(name, folders, is_model_folder)


def local_weights(pretrained: str, folders: Sequence[Path] = HERE) -> Path | None:
    """Return the file of a tower's weights; None for a pretrained tag of OpenCLIP."""
    return local_path(pretrained, folders, os.path.isfile)


def is_model_folder(path: Path) -> bool:
    """Return whether a folder holds the configuration of a language model or a vision tower."""
    return any(os.path.isfile(path / file) for file in (CONFIG_FILE, OPEN_CLIP_CONFIG_FILE))


def commit_of(path: Path) -> str | None:
    """Return the commit of a path in the Hugging Face cache (``snapshots/<commit>/``); None elsewhere."""
    match = re.search(r"/models--[^/]+/snapshots/([^/]+)(/|$)", path.as_posix())
    return match[1] if match else None


def existing_path(place: str | Path) -> Path:
    """Return ``place`` as a path. Raises UserError, with a similar path, if it does not exist."""
    path = Path(os.path.expanduser(place))
    if str(place) and os.path.exists(path):
        return path
    raise UserError(missing_path_message(place))


def check_path_exists(place: str | Path) -> None:
    """Raise UserError if ``place`` is a path, not a name on the Hub, and does not exist."""
    if hub_name(place) is None:
        existing_path(place)


def missing_path_message(
    place: str | Path,
    kind: str | None = None,
    *,
    name: str | None = None,
    on_hub: str | None = None,
    remedy: str = "check the path",
) -> str:
    """Return the error message for a path that does not exist.

    Args:
        kind: "file" or "folder"; by default as the suffix says.
        name: what the user gave, if it differs from ``place``.
        on_hub: how to name the repository on the Hub that may be meant; by default ``name`` with a revision.
        remedy: what to do if no existing path is similar.
    """
    text = str(place)
    kind = kind or ("file" if PurePath(text).suffix.lower() in FILE_SUFFIXES else "folder")
    nearest = None if set("*?[") & set(text) else nearest_path(text)
    remedy = f"did you mean {nearest}?" if nearest else remedy
    name = text if name is None else name
    hint = f" (on the Hub: {on_hub or f'{name}@main'})" if NAME.fullmatch(name) else ""
    return f"no {kind} {text or repr(text)}; {remedy}{hint}"


def nearest_path(place: str | Path) -> Path | None:
    """Return the existing path most similar to ``place``; None if a component has no similar one."""
    path = Path(os.path.expanduser(str(place).replace("\\", "/")))
    nearest = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        name = part if os.path.exists(nearest / part) else _nearest_entry(nearest, part)
        if name is None:
            return None
        nearest /= name
    return nearest if path.parts else None


def _nearest_entry(folder: Path, name: str) -> str | None:
    """Return the entry of a folder that is most similar to ``name``, ignoring case."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name.lower(): entry.name for entry in islice(entries, MAX_ENTRIES)}
    except OSError:  # not a folder, or not readable: nothing to suggest
        return None
    similar = difflib.get_close_matches(name.lower(), names, n=1, cutoff=MIN_SIMILARITY)
    return names[similar[0]] if similar else None


# --- local paths in what is published ---

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
