"""The folder that a check is written to. Only an earlier check is ever replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.errors import UserError

from .findings import MADE_BY

RECORD_FILE = "check.json"


@contextmanager
def check_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, whose files are moved to ``folder`` in the end, when nothing failed.

    Raises UserError where ``folder`` is a file, or holds files but no check.
    """
    _refuse_other_things(folder)
    with atomic.files_in_place(folder, first=RECORD_FILE) as new:
        yield new


def _refuse_other_things(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder: --out FOLDER")
    if folder.is_dir() and any(folder.iterdir()) and not _holds_check(folder):
        raise UserError(f"{folder}: holds files but no earlier check; choose another folder: --out FOLDER")


def _holds_check(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("made_by") == MADE_BY
