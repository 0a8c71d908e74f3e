"""A checkpoint on disk: the adapter so far, and everything that training needs to go on as if never interrupted.

``step-N/`` is an adapter's folder like any other, the recipe and the answers from before training beside it; ``best/`` in
it is the adapter of the best evaluation so far, if there was one;
``training/`` in it has what `transformers.Trainer` keeps (optimizer, schedule, loss scale, random numbers, log) and each
process's place in the data; ``checkpoint.json`` says that all of it is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import save_adapter
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.results import PREDICTIONS_FILE
from flamingo_ft.formatting import error_message
from flamingo_ft.machine_errors import disk_failure
from flamingo_ft.model import FlamingoProcessor

from .folders import best_folder, checkpoint_folder, checkpoints, keep_newest
from .manifest import seal

if TYPE_CHECKING:
    from flamingo_ft.training.engine import Engine

TRAINING = "training"


@dataclass(frozen=True)
class Keeping:
    """How checkpoints are kept. run: the output folder, whose recipe and answers go along; limit: how many stay;
    sources: rows of each source of training data, to know it again."""

    root: Path
    limit: int
    run: Path
    processor: FlamingoProcessor
    sources: Mapping[str, int | None]


def save_checkpoint(engine: Engine, keeping: Keeping) -> Path:
    """Write a checkpoint of this step; every process has to come here. UserError where the disk does not take it."""
    folder = checkpoint_folder(keeping.root, engine.state.global_step)
    try:
        if processes.is_main():
            atomic.begin_folder(folder)
        processes.barrier()
        beside = atomic.partial_path(folder)
        _write(engine, keeping, beside)
        processes.barrier()
        if processes.is_main():
            seal(beside, _facts(engine, keeping))
            atomic.finish_folder(folder)
            keep_newest(keeping.root, keeping.limit)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and disk_failure(error) is None:
            raise  # an incomplete adapter, a GPU that failed: nothing that room on the disk would cure
        raise UserError(_message(folder, keeping.root, error)) from error
    processes.barrier()
    return folder


def _write(engine: Engine, keeping: Keeping, folder: Path) -> None:
    training = folder / TRAINING
    training.mkdir(exist_ok=True)
    engine._save_optimizer_and_scheduler(str(training))
    engine._save_scaler(str(training))
    engine._save_rng_state(str(training))
    (training / data_file(processes.rank())).write_text(
        json.dumps(engine.batches.state_dict()), encoding="utf-8"
    )
    model = engine.accelerator.unwrap_model(engine.model)
    save_adapter(model, keeping.processor, folder, write=processes.is_main())
    if processes.is_main():
        _note_callbacks(engine)
        engine.state.save_to_json(str(training / TRAINER_STATE_NAME))
        for name in (RECIPE_FILE, PREDICTIONS_FILE):
            if (keeping.run / name).is_file():
                shutil.copyfile(keeping.run / name, folder / name)
        if engine.state.best_global_step is not None and best_folder(keeping.root).is_dir():
            atomic.link_folder(best_folder(keeping.root), best_folder(folder))


def data_file(rank: int) -> str:
    """Where a process's place in the data is kept."""
    return f"data-{rank}.json"


def _note_callbacks(engine: Engine) -> None:
    """Put the state of callbacks that have one into the trainer's."""
    for callback in [*engine.callback_handler.callbacks, engine.control]:
        if isinstance(callback, ExportableState):
            engine.state.stateful_callbacks[type(callback).__name__] = callback.state()


def _facts(engine: Engine, keeping: Keeping) -> dict[str, Any]:
    return {
        "step": engine.state.global_step,
        "processes": processes.world_size(),
        "seconds": round(engine.seconds(), 1),
        "ended": engine.ended(),
        "sources": dict(keeping.sources),
    }


def _message(folder: Path, root: Path, error: Exception) -> str:
    good = next(iter(checkpoints(root).values()), None)
    last = f"the last one is {good}" if good else "there is none yet"
    return (
        f"{folder}: cannot write this checkpoint ({error_message(error)}); {last}; "
        "make room there or name another train.checkpoint_dir, and go on with --resume"
    )
