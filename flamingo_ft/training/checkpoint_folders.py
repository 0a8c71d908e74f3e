"""The checkpoint folders of a run: ``step-N`` in one root folder, the oldest ones deleted.

A manifest in each of them holds size and SHA-256 of every file, so that damage is noticed before resuming.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError

MANIFEST = "checkpoint.json"
FORMAT = 1
CHUNK_BYTES = 2**20  # read at once


def checkpoint_root(train_config: TrainSection) -> Path:
    """Return the folder that holds all checkpoints of a run."""
    return train_config.checkpoint_dir or train_config.output_dir / "checkpoints"


def best_folder(parent: Path) -> Path:
    """Return the folder of the best adapter so far, in the checkpoint root or in a single checkpoint."""
    return parent / "best"


def prepare_checkpoint_root(root: Path) -> None:
    """Create ``root``, before hours of training. Raises UserError if it is not writable."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        atomic.remove_leftovers(root)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"train.checkpoint_dir: cannot write checkpoints to {root}: {error.strerror}; "
            "choose a writable folder"
        ) from None


def refuse_existing_checkpoints(root: Path) -> None:
    """Raise UserError if ``root`` already holds checkpoints of another run.

    Pruning keeps the highest steps, so it would delete the new run's checkpoints first.
    """
    newest = newest_checkpoint(root)
    if newest is not None:
        raise UserError(
            f"train.checkpoint_dir: {root} holds {newest.name} of an earlier run; "
            "resume that run with --resume, delete its checkpoints, or choose another folder"
        )


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint written after ``step`` optimizer steps."""
    return root / f"step-{step}"


def list_checkpoints(root: Path) -> dict[int, Path]:
    """Return all checkpoints by step, newest first, without verifying them."""
    checkpoints: dict[int, Path] = {}
    for path in root.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    return dict(sorted(checkpoints.items(), reverse=True))


def newest_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint, without verifying it."""
    return next(iter(list_checkpoints(root).values()), None)


def latest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and what is wrong with each newer one.

    Raise NewerFormat for a checkpoint of a later flamingo_ft.
    """
    problems: list[str] = []
    for path in list_checkpoints(root).values():
        try:
            verify(path)
        except NewerFormat:
            raise
        except UserError as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def prune_checkpoints(root: Path, limit: int) -> None:
    """Delete all but the newest ``limit`` checkpoints."""
    for path in list(list_checkpoints(root).values())[limit:]:
        atomic.remove_folder(path)


def quarantine_newer(root: Path, checkpoint: Path | None) -> Iterator[Path]:
    """Rename the checkpoints newer than ``checkpoint``, which are damaged, to ``step-N.damaged``.

    Yields their new paths.
    """
    for path in list_checkpoints(root).values():
        if path == checkpoint:
            return
        quarantined = path.with_name(f"{path.name}.damaged")
        if quarantined.exists():
            atomic.remove_folder(quarantined)
        yield path.rename(quarantined)


# --- the manifest ---


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
    """Check every file against the manifest and return it. Raises UserError for a damaged checkpoint."""
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

    Raises UserError if it is missing or damaged, NewerFormat if a later flamingo_ft wrote it.
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
