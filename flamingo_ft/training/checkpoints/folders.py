"""The checkpoint folders of a run: ``step-N`` in one root folder, the oldest ones deleted."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError

from .manifest import NewerFormat, verify


def checkpoint_root(train_config: TrainSection) -> Path:
    """Return the folder that holds all checkpoints of a run."""
    return train_config.checkpoint_dir or train_config.output_dir / "checkpoints"


def best_folder(parent: Path) -> Path:
    """Return the folder of the best adapter so far, in the checkpoint root or in a single checkpoint."""
    return parent / "best"


def prepare_checkpoint_root(root: Path) -> None:
    """Create ``root``, before hours of training. Raise UserError if it is not writable."""
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
    found: dict[int, Path] = {}
    for path in root.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


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
