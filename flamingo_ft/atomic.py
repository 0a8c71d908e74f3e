"""Files and folders that are there whole or not at all, whenever a process is killed.

What is new is written beside its place, synced to the disk, and renamed; POSIX renames in one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"  # endings of hidden names beside the place


@contextmanager
def file_in_place(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once the block ends without an error."""
    hidden = beside(path)
    try:
        yield hidden
        sync(hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    with file_in_place(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def beside(place: Path) -> Path:
    """The hidden name that something has until it is put at ``place``."""
    return place.with_name(f".{place.name}{PARTIAL}")


def link_folder(folder: Path, copy: Path) -> None:
    """The same files at ``copy``, which must not exist: as hard links, which cost nothing, where the disk has them.

    Of files that are only ever replaced, never written to, a link is as good as a copy.
    """
    for copy_function in (os.link, shutil.copy2):
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(folder, copy, copy_function=copy_function)
        except OSError as error:
            failed = error
        else:
            return
    shutil.rmtree(copy, ignore_errors=True)
    raise failed


def begin_folder(place: Path) -> Path:
    """An empty folder beside ``place``, for `finish_folder` to put there."""
    hidden = beside(place)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def finish_folder(place: Path) -> None:
    """Sync what `begin_folder` gave and put it at ``place``; what was there is gone afterwards."""
    hidden = beside(place)
    for path in sorted(hidden.rglob("*")):
        sync(path)
    sync(hidden)
    if place.exists():
        place.rename(_free(place, REPLACED))
    hidden.rename(place)
    sync(place.parent)
    _free(place, REPLACED)


@contextmanager
def folder_in_place(place: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name ``place`` once the block ends without an error, and is gone otherwise."""
    hidden = begin_folder(place)
    try:
        yield hidden
        finish_folder(place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; half of it is never left under its name."""
    folder.rename(_free(folder, REMOVED))
    _free(folder, REMOVED)


def sweep(parent: Path) -> None:
    """Remove what killed processes left half written or half removed in ``parent``; what was to be replaced, and is not,
    comes back."""
    for path in parent.glob(f".*{REPLACED}"):
        place = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if not place.exists():
            path.rename(place)
    for path in filter(is_leftover, list(parent.iterdir())):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether this has a name that only something half written or half removed has."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, REPLACED, REMOVED))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(place: Path, ending: str) -> Path:
    """The hidden name beside ``place`` with this ending, nothing under it."""
    name = place.with_name(f".{place.name}{ending}")
    shutil.rmtree(name, ignore_errors=True)
    return name
