"""What a checkpoint consists of, so that a damaged one is never taken for a good one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

MANIFEST = "checkpoint.json"
FORMAT = 1
PIECE = 2**20  # bytes read at once


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of all files in ``folder``, and ``facts`` beside them."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": FORMAT, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole. UserError, saying what is wrong with it, for any other."""
    record = read_manifest(folder)
    for name, wanted in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: not there, though the checkpoint had it")
        found = path.stat().st_size
        if found != wanted["bytes"]:
            raise UserError(f"{path}: found {found:,} bytes, wanted {wanted['bytes']:,}; it was cut off")
        if _sha256(path) != wanted["sha256"]:
            raise UserError(f"{path}: its content is not what was written (SHA-256 differs)")
    return record


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, files unchecked. UserError where there is none, or one of a newer version."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no checkpoint, its {MANIFEST} is missing or damaged") from None
    if version > FORMAT:
        raise UserError(f"{folder}: checkpoint of format {version}, newer than {FORMAT}; upgrade flamingo_ft")
    return record


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
