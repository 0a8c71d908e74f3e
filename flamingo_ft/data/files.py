"""File names as users write them and as disks keep them: macOS decomposes accents (NFD), others mostly do not (NFC).

A file that is read here and there without being loaded, by several processes.

Files that operating systems, file managers and editors leave in folders and archives, and nobody means as data.
"""

from __future__ import annotations

import mmap
import os
import unicodedata
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

FORMS = ("NFC", "NFD")


def same_name(a: str, b: str) -> bool:
    """Whether two names are the same text, whichever way their accents are encoded."""
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def resolve_unicode(path: Path) -> Path:
    """Return the path under the names that exist: each part as written, else in NFC or NFD, as far as there are any."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        names = (part, *(unicodedata.normalize(form, part) for form in FORMS))
        found = found / next((name for name in names if os.path.lexists(found / name)), part)
    return found


UTF8_MARK = b"\xef\xbb\xbf"  # Windows editors put it first
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class MappedFile:
    """Bytes of a file, memory-mapped once in every process that asks.

    Raises UserError when the file is not the one any more that was first seen: its index would point elsewhere, and
    reading a map beyond the end of a shortened file ends the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stamp = _stamp(path)
        self._map: mmap.mmap | None = None

    @property
    def size(self) -> int:
        return self._stamp[0]

    def view(self) -> mmap.mmap | bytes:
        """The whole file; not copied."""
        if _stamp(self.path) != self._stamp:
            raise UserError(
                f"{self.path}: found another file than at the start; leave data alone while it is read"
            )
        if self._map is None and self.size:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return b"" if self._map is None else self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


def skip_bom(path: Path) -> int:
    """Where a UTF-8 text file begins, after the mark it may have. UserError for UTF-16."""
    with open(path, "rb") as file:
        head = file.read(3)
    if head.startswith(UTF16_MARKS):
        raise UserError(f"{path}: found UTF-16, wanted UTF-8; save the file as UTF-8")
    return len(UTF8_MARK) if head == UTF8_MARK else 0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    return status.st_size, status.st_mtime_ns


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
PAX_FOLDER = "paxheaders"  # extended headers, as tar programs that do not know them unpack them


def is_system_file(path: str) -> bool:
    """Whether a path, relative to its folder or archive and with forward slashes, names such a file."""
    *folders, name = path.lower().split("/")
    if name in FILES or name.startswith(APPLE_DOUBLE):
        return True
    return any(folder in FOLDERS or folder.partition(".")[0] == PAX_FOLDER for folder in folders)
