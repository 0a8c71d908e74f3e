"""Where the checkpoints of a run lie: ``step-N`` in one folder, the oldest of them removed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError

from .manifest import NewerFormat, verify


def checkpoint_root(train: TrainSection) -> Path:
    """The folder that holds them."""
    return train.checkpoint_dir or train.output_dir / "checkpoints"


def best_folder(place: Path) -> Path:
    """The adapter of the best evaluation so far: of a run, beside its checkpoints; of a checkpoint, inside it."""
    return place / "best"


def prepare_root(root: Path) -> None:
    """Make sure, before hours of training, that checkpoints can be written there. UserError where they cannot."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        atomic.remove_leftovers(root)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        found = f"{root}: {error.strerror}"
        raise UserError(
            f"train.checkpoint_dir: cannot write checkpoints to {found}; name a folder that can be"
        ) from None


def refuse_earlier(root: Path) -> None:
    """Refuse, with a UserError, to begin where another run's checkpoints are: the new ones would be the oldest of all."""
    earlier = next(iter(checkpoints(root).values()), None)
    if earlier is not None:
        raise UserError(
            f"train.checkpoint_dir: {root} holds {earlier.name} of an earlier run; go on with that run with --resume, "
            "remove its checkpoints, or name another folder"
        )


def checkpoint_folder(root: Path, step: int) -> Path:
    """The checkpoint that was written after so many optimizer steps."""
    return root / f"step-{step}"


def checkpoints(root: Path) -> dict[int, Path]:
    """All that are there, by step, newest first; whether they are whole is not looked at."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.glob("step-*") if path.is_dir())
    return dict(sorted(((int(match[1]), path) for match, path in found if match), reverse=True))


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those after it. NewerFormat for one of a later version."""
    wrong: list[str] = []
    for path in checkpoints(root).values():
        try:
            verify(path)
        except NewerFormat:
            raise
        except UserError as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong


def keep_newest(root: Path, limit: int) -> None:
    """Remove all but the newest ``limit`` checkpoints."""
    for path in list(checkpoints(root).values())[limit:]:
        atomic.remove_folder(path)


def set_aside_after(root: Path, start: Path | None) -> Iterator[Path]:
    """Rename those newer than ``start``, damaged as they are, so that they count no more; gives their new names."""
    for path in checkpoints(root).values():
        if path == start:
            return
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists():
            atomic.remove_folder(aside)
        yield path.rename(aside)
