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


class NewerFormat(UserError):
    """A checkpoint that is whole, and written by a later version."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of all files in ``folder``, and ``facts`` beside them."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": FORMAT, **facts, "files": files}
    record["sha256"] = _sha256_of(record)
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole. UserError, saying what is wrong with it, for any other."""
    record = read_manifest(folder)
    for name, wanted in record["files"].items():
        _verify_file(folder / name, wanted)
    return record


def _verify_file(path: Path, wanted: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: not there, though the checkpoint had it")
    found = path.stat().st_size
    if found != wanted["bytes"]:
        raise UserError(f"{path}: found {found:,} bytes, wanted {wanted['bytes']:,}; it was cut off")
    try:
        same = _sha256(path) == wanted["sha256"]
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not same:
        raise UserError(f"{path}: its content is not what was written (SHA-256 differs)")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, files unchecked. UserError where there is none, NewerFormat for one of a later flamingo_ft."""
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        newer = record["format"] > FORMAT
        whole = newer or record.pop("sha256") == _sha256_of(record)
    except PermissionError:
        raise  # nothing is wrong with the file
    except (OSError, ValueError, KeyError, TypeError):
        newer = whole = False
    if newer:
        raise NewerFormat(
            f"{folder}: checkpoint of format {record['format']}, newer than {FORMAT}; upgrade flamingo_ft"
        )
    if not whole:
        raise UserError(f"{folder}: no checkpoint, its {MANIFEST} is missing or damaged")
    return record


def _sha256_of(record: dict[str, Any]) -> str:
    """Of a manifest without this sum, however it is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
