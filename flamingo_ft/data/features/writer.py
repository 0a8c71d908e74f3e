"""Adding to the tokens on disk, within a budget, beside other processes that do the same."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

from torch import Tensor

from flamingo_ft import atomic

from .store import FeatureStore

PARTIAL = "partial"  # folder of files that are being written
ABANDONED_S = 3600.0  # a file that has been written for longer was left behind by a run that was killed


class FeatureWriter:
    """Adds tokens to ``store`` until the files under ``root`` have ``max_bytes`` together; nothing is ever removed.

    Files are counted once, at the beginning, and as they are added. Each of ``writers`` processes that share the folder
    takes an equal part of what is left then. Where the disk is full or read-only, adding ends with one warning, and
    training goes on: the tokens only save time.
    """

    def __init__(self, store: FeatureStore, root: Path, max_bytes: int | None = None, writers: int = 1):
        self.store = store
        self.left = None if max_bytes is None else max(0, max_bytes - bytes_under(root)) // writers
        self.is_open = self.left != 0
        self._partial = store.folder / PARTIAL
        _remove_abandoned(self._partial)

    def add(self, key: str, tokens: Tensor) -> None:
        """Keep tokens (V, D), unless they are there already or there is no room."""
        if not self.is_open or self.store.get(key) is not None:
            return
        content = self.store.content(key, tokens.detach().cpu())
        if self.left is not None and len(content) > self.left:
            self.is_open = False
            return
        try:
            self._write(self.store.path(key), content)
        except OSError as error:
            self._give_up(error)
            return
        if self.left is not None:
            self.left -= len(content)

    def _write(self, path: Path, content: bytes) -> None:
        for folder in (self._partial, path.parent):
            folder.mkdir(exist_ok=True)
        atomic.write_shared(path, content, self._partial)

    def _give_up(self, error: OSError) -> None:
        self.is_open = False
        warnings.warn(
            f"data.cache.folder: {self.store.folder}: nothing is added any more ({error.strerror}); "
            "what is there is used, other images are encoded each time",
            stacklevel=3,
        )


def bytes_under(folder: Path) -> int:
    """What the files below a folder have together; files that go away meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _remove_abandoned(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        return
    for file in folder.iterdir():
        try:
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()
        except FileNotFoundError:
            continue
