"""From a checkpoint back to where training stood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import restore_trainable
from flamingo_ft.errors import UserError

from .folders import best_folder
from .manifest import read_manifest
from .save import TRAINING, data_file

if TYPE_CHECKING:
    from flamingo_ft.training.engine import Engine


def check_fits(folder: Path, sources: Mapping[str, int | None]) -> None:
    """Refuse, with a UserError, to go on with other data or another number of processes."""
    record = read_manifest(folder)
    if record["processes"] != processes.world_size():
        raise UserError(
            f"{folder}: written by {record['processes']} processes, found {processes.world_size()}; the samples of a "
            f"batch would change: resume with {record['processes']}"
        )
    for name, rows in record["sources"].items():
        if name in sources and sources[name] != rows:
            found = f"{name} had {rows} rows when it was written, found {sources[name]}"
            raise UserError(
                f"{folder}: {found}; restore the file, or begin a new run in another train.output_dir"
            )


def restore(engine: Engine, folder: Path) -> None:
    """Trained parameters, the place in the data and the best adapter; `Trainer` itself reads the rest from ``training/``."""
    restore_trainable(engine.accelerator.unwrap_model(engine.model), folder)
    state = (folder / TRAINING / data_file(processes.rank())).read_text(encoding="utf-8")
    engine.batches.load_state_dict(json.loads(state))
    engine.seconds_before = read_manifest(folder)["seconds"]
    if processes.is_main():
        _restore_best(folder, engine.keeping.root)
    processes.barrier()


def _restore_best(folder: Path, root: Path) -> None:
    """Put the checkpoint's best adapter beside the checkpoints. Earlier checkpoints have none: what is there stays."""
    if best_folder(folder).is_dir():
        atomic.begin_folder(best_folder(root)).rmdir()
        atomic.link_folder(best_folder(folder), atomic.partial_path(best_folder(root)))
        atomic.finish_folder(best_folder(root))
