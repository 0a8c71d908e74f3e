"""File names as users write them and as disks keep them: macOS decomposes accents (NFD), others mostly do not (NFC)."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

FORMS = ("NFC", "NFD")


def same_name(a: str, b: str) -> bool:
    """Whether two names are the same text, whichever way their accents are encoded."""
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def on_disk(path: Path) -> Path:
    """Return the path under the names that exist: each part as written, else in NFC or NFD, as far as there are any."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        names = (part, *(unicodedata.normalize(form, part) for form in FORMS))
        found = found / next((name for name in names if os.path.lexists(found / name)), part)
    return found
