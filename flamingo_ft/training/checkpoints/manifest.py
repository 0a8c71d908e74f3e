"""The manifest of a checkpoint: size and SHA-256 of every file, so that damage is noticed before resuming."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError

MANIFEST = "checkpoint.json"
FORMAT = 1
CHUNK_BYTES = 2**20  # read at once


class NewerFormat(UserError):
    """An undamaged checkpoint, written by a later version of flamingo_ft."""


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of all files in ``folder``, together with ``facts`` about the run."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"format": FORMAT, **facts, "files": files}
    record["sha256"] = _record_sha256(record)
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it. Raise UserError for a damaged checkpoint."""
    record = read_manifest(folder)
    for name, expected in record["files"].items():
        _verify_file(folder / name, expected)
    return record


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing from the checkpoint")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{path}: expected {expected['bytes']:,} bytes, got {size:,}; the file is truncated")
    try:
        intact = _sha256(path) == expected["sha256"]
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not intact:
        raise UserError(f"{path}: SHA-256 differs from the manifest; the file is damaged")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without checking the files.

    Raise UserError if it is missing or damaged, NewerFormat if a later flamingo_ft wrote it.
    """
    path = folder / MANIFEST
    record: dict[str, Any] = {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        newer = record["format"] > FORMAT
        intact = newer or record.pop("sha256") == _record_sha256(record)
    except PermissionError:
        raise  # the file itself may be fine
    except (OSError, ValueError, KeyError, TypeError):
        newer = intact = False
    if newer:
        raise NewerFormat(
            f"{folder}: checkpoint format {record['format']} is newer than {FORMAT}; upgrade flamingo_ft"
        )
    if not intact:
        raise UserError(f"{folder}: not a checkpoint, {MANIFEST} is missing or damaged")
    return record


def _record_sha256(record: dict[str, Any]) -> str:
    """Hash a manifest without its own ``sha256`` entry, independently of its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
