"""Atomic writes: a file or folder is complete or absent, whenever the process is killed.

New content is written to a hidden name beside its destination, synced to disk, and renamed; POSIX renames are
atomic.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

# Suffixes of the hidden names beside a destination.
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"


@contextmanager
def file_in_place(path: Path) -> Generator[Path]:
    """Yield a path to write to; it replaces ``path`` when the block ends without an error."""
    partial = partial_path(path)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with file_in_place(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_shared(path: Path, content: bytes, scratch: Path) -> None:
    """Write a file that several processes may write at the same time; the last one wins.

    No sync, for files that can be written again.

    Args:
        scratch: folder on the same file system that holds the incomplete file.
    """
    partial = scratch / uuid.uuid4().hex
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(place: Path) -> Path:
    """Return the hidden name under which ``place`` is written."""
    return place.with_name(f".{place.name}{PARTIAL}")


def link_folder(folder: Path, copy: Path) -> None:
    """Copy ``folder`` to ``copy``, which must not exist: by hard links where the file system has them.

    A hard link costs nothing and is as good as a copy for files that are replaced but never modified.
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
    """Return an empty hidden folder beside ``place``; `finish_folder` moves it there."""
    partial = partial_path(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(place: Path) -> None:
    """Sync the folder from `begin_folder` and move it to ``place``, replacing what was there."""
    partial = partial_path(place)
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    if place.exists():
        place.rename(_cleared(place, REPLACED))
    partial.rename(place)
    sync(place.parent)
    _cleared(place, REPLACED)


@contextmanager
def folder_in_place(place: Path) -> Generator[Path]:
    """Yield a folder to write to; it replaces ``place`` when the block ends without an error, else it is
    removed."""
    partial = begin_folder(place)
    try:
        yield partial
        finish_folder(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def files_in_place(folder: Path, first: str) -> Generator[Path]:
    """Yield a temporary folder whose files move to ``folder`` one by one when the block ends without an
    error.

    Other files in ``folder`` stay.

    Args:
        first: name of the file that is moved first, so that an interrupted move can be recognized.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        yield Path(partial)
        folder.mkdir(exist_ok=True)
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name != first):
            os.replace(path, folder / path.name)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill never leaves half of it under its name."""
    folder.rename(_cleared(folder, REMOVED))
    _cleared(folder, REMOVED)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left half written or half removed in ``parent``.

    A folder that was about to be replaced is restored if its replacement never arrived.
    """
    for path in parent.glob(f".*{REPLACED}"):
        place = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if not place.exists():
            path.rename(place)
    for path in filter(is_leftover, list(parent.iterdir())):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Return whether this is the hidden name of something half written or half removed."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, REPLACED, REMOVED))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cleared(place: Path, suffix: str) -> Path:
    """Return the hidden name beside ``place`` with this suffix, after removing what is there."""
    hidden = place.with_name(f".{place.name}{suffix}")
    shutil.rmtree(hidden, ignore_errors=True)
    return hidden
