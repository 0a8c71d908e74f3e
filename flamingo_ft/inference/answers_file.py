"""A file of answers that grows while they are generated, and continues where a killed run stopped.

Beside an unfinished file ``answers.jsonl`` stands ``answers.jsonl.unfinished``: the settings it is made with,
and how many rows and bytes are safely in it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.errors import UserError

COLUMNS = ("where", "images", "prompt", "answer", "reference", "error", "boxes")
FORMATS = (".jsonl", ".csv")


class AnswersFile:
    """Appends rows to a JSONL or CSV file, by its suffix.

    settings: what its rows depend on, as JSON; a file that was begun with others is not continued. rows: how
    many are in it already.

    Raises UserError for another suffix, for an existing file without ``resume`` or ``overwrite``, and if it
    cannot be continued.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ):
        if path.suffix not in FORMATS:
            raise UserError(f"--out: must end in {' or '.join(FORMATS)}, got {path.name}; rename it")
        self.path, self._settings = path, dict(settings)
        self._progress = path.with_name(path.name + ".unfinished")
        self.rows, self.is_complete, size = 0, False, 0
        if path.exists() and not overwrite:
            self.rows, size = self._stored(resume)
        if not self.is_complete:
            self._begin(size)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, with some of `COLUMNS` each, and make them safe from a kill."""
        text = _csv(rows) if self.path.suffix == ".csv" else _json_lines(rows)
        self._file.write(text.encode())
        self.rows += len(rows)
        self._record()

    def finish(self) -> None:
        """Mark the file as complete."""
        self._file.close()
        self._progress.unlink(missing_ok=True)
        self.is_complete = True

    def close(self) -> None:
        """Close the file; it can be continued later. One without rows is removed."""
        if self.is_complete:
            return
        self._file.close()
        if not self.rows:
            self.path.unlink()
            self._progress.unlink(missing_ok=True)

    def _begin(self, size: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if size else "wb")
        self._file.truncate(size)  # what a kill left behind the last safe row
        self._file.seek(size)
        if not size and self.path.suffix == ".csv":
            self._file.write((",".join(COLUMNS) + "\n").encode())
        self._record()

    def _record(self) -> None:
        """Write the rows to disk, then how many they are."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {"rows": self.rows, "bytes": self._file.tell(), "settings": self._settings}
        atomic.write_text(self._progress, json.dumps(state, indent=2) + "\n")

    def _stored(self, resume: bool) -> tuple[int, int]:
        """Return how many rows and bytes of the existing file are safe."""
        if not resume:
            remedy = "pass --resume to continue it, or --overwrite to replace it"
            raise UserError(f"--out: {self.path} exists; {remedy}")
        if not self._progress.is_file():
            self.is_complete = True
            return 0, 0
        state = json.loads(self._progress.read_text(encoding="utf-8"))
        for name, value in state["settings"].items():
            if value != self._settings.get(name):
                raise UserError(
                    f"--resume: {self.path} was begun with {name} {value}, got {self._settings.get(name)}; "
                    "use the same, or pass --overwrite"
                )
        return state["rows"], state["bytes"]


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; several images of a row are separated by line breaks, boxes are JSON text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    for row in rows:
        writer.writerow({**row, **_csv_cells(row)})
    return text.getvalue()


def _csv_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return what CSV has for lists."""
    boxes = {"boxes": json.dumps(row["boxes"])} if "boxes" in row else {}
    return {"images": "\n".join(row.get("images", ())), **boxes}
