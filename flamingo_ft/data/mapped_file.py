"""A file that is read here and there without being loaded, by several processes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

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


def text_start(path: Path) -> int:
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
