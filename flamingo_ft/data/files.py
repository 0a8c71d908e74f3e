"""Data files: Unicode forms of their names, files that operating systems leave behind, memory mapping."""

from __future__ import annotations

import mmap
import os
import unicodedata
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

# macOS decomposes accents in file names (NFD), other systems mostly do not (NFC).
FORMS = ("NFC", "NFD")
UTF8_BOM = b"\xef\xbb\xbf"  # Windows editors write it
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
FOLDERS = frozenset(
    {
        "__macosx",
        ".appledouble",
        ".documentrevisions-v100",
        ".fseventsd",
        ".spotlight-v100",
        ".temporaryitems",
        ".trashes",
        "$recycle.bin",
        "system volume information",
        "@eadir",  # Synology: thumbnails, which are real images
        "#recycle",
        "@recycle",
        ".ipynb_checkpoints",
        "lost+found",
    }
)
FILES = frozenset(
    {
        ".ds_store",
        ".localized",
        "icon\r",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        ".directory",
        "pax_global_header",
    }
)
APPLE_DOUBLE = "._"  # macOS: the resource fork of the file of that name, with the same extension
PAX_FOLDER = "paxheaders"  # where tar programs without pax support extract extended headers


def same_name(a: str, b: str) -> bool:
    """Whether two names are the same text, however their accents are encoded."""
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def resolve_unicode(path: Path) -> Path:
    """Return the path under the names on disk: each part as given, or in NFC or NFD if only that exists."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    resolved = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        names = (part, *(unicodedata.normalize(form, part) for form in FORMS))
        resolved = resolved / next((name for name in names if os.path.lexists(resolved / name)), part)
    return resolved


def is_system_file(path: str) -> bool:
    """Whether operating systems, file managers or editors leave a file of this name in folders and archives.

    path: relative to the folder or archive, with forward slashes.
    """
    *folders, name = path.lower().split("/")
    if name in FILES or name.startswith(APPLE_DOUBLE):
        return True
    return any(folder in FOLDERS or folder.partition(".")[0] == PAX_FOLDER for folder in folders)


class MappedFile:
    """A file that is memory-mapped once in every process that reads it.

    Raises UserError if the file was changed since it was first seen: an index of it would be wrong, and
    reading a map beyond the end of a truncated file kills the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stamp = _stamp(path)
        self._map: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._stamp[0]

    def view(self) -> mmap.mmap | bytes:
        """Return the whole file, not copied."""
        if _stamp(self.path) != self._stamp:
            raise UserError(f"{self.path}: changed since the run began; leave data alone while it is read")
        if self._map is None and self.size:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return b"" if self._map is None else self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


def skip_bom(path: Path) -> int:
    """Return where the text of a UTF-8 file begins, in bytes: after its byte order mark.

    Raises UserError for UTF-16.
    """
    with open(path, "rb") as file:
        head = file.read(3)
    if head.startswith(UTF16_BOMS):
        raise UserError(f"{path}: expected UTF-8, got UTF-16; save the file as UTF-8")
    return len(UTF8_BOM) if head == UTF8_BOM else 0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    return status.st_size, status.st_mtime_ns
