"""Save checkpoints, and resume training from them bit for bit.

A checkpoint ``step-N/`` is an ordinary adapter folder, with the recipe and the predictions from before
training added:

- ``best/``: the adapter of the best evaluation so far, if there was one;
- ``training/``: what `transformers.Trainer` saves (optimizer, schedule, loss scale, random states, log) and
  the position of each process in the data;
- ``checkpoint.json``: the manifest, written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import restore_trainable, save_adapter
from flamingo_ft.config import PREDICTIONS_FILE, RECIPE_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.machine_errors import disk_failure
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .checkpoint_folders import (
    best_folder,
    checkpoint_folder,
    newest_checkpoint,
    prune_checkpoints,
    read_manifest,
    write_manifest,
)

TRAINER_FOLDER = "training"  # in a checkpoint
SCHEDULER_FILE = "scheduler.pt"  # as Trainer names it


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where checkpoints go and how many are kept.

    root: folder of all checkpoints. limit: how many to keep. run_folder: the output folder, whose recipe and
    predictions are copied into each checkpoint. source_rows: rows of each training source (None for a
    stream), to detect that the data have changed.
    """

    root: Path
    limit: int
    run_folder: Path
    processor: FlamingoProcessor
    source_rows: Mapping[str, int | None]


class Stateful(Protocol):
    """An object with JSON-serializable state, such as the position in the training data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointedTrainer(Protocol):
    """What checkpoints need from a trainer.

    earlier_seconds: training time before the last resume.
    """

    state: TrainerState
    checkpoint_policy: CheckpointPolicy
    earlier_seconds: float

    @property
    def batches(self) -> Stateful: ...

    def unwrapped_model(self) -> FlamingoForConditionalGeneration: ...

    def save_trainer_files(self, folder: Path) -> None:
        """Write optimizer, schedule, loss scale, random states and trainer state; every process calls it."""

    def seconds(self) -> float: ...

    def is_finished(self) -> bool: ...


def save_checkpoint(trainer: CheckpointedTrainer) -> Path:
    """Write a checkpoint of the current step; every process must call it.

    Raises UserError if the disk is full.
    """
    policy = trainer.checkpoint_policy
    folder = checkpoint_folder(policy.root, trainer.state.global_step)
    try:
        if processes.is_main():
            atomic.begin_folder(folder)
        processes.barrier()
        partial = atomic.partial_path(folder)
        _write_files(trainer, partial)
        processes.barrier()
        if processes.is_main():
            write_manifest(partial, _facts(trainer))
            atomic.finish_folder(folder)
            prune_checkpoints(policy.root, policy.limit)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and disk_failure(error) is None:
            raise  # an incomplete adapter or a failed GPU: not the disk's fault
        raise UserError(_disk_message(folder, policy.root, error)) from error
    processes.barrier()
    return folder


def _write_files(trainer: CheckpointedTrainer, folder: Path) -> None:
    policy = trainer.checkpoint_policy
    trainer_folder = folder / TRAINER_FOLDER
    trainer_folder.mkdir(exist_ok=True)
    trainer.save_trainer_files(trainer_folder)
    data_state = json.dumps(trainer.batches.state_dict())
    (trainer_folder / _data_file(processes.rank())).write_text(data_state, encoding="utf-8")
    save_adapter(trainer.unwrapped_model(), policy.processor, folder, write=processes.is_main())
    if processes.is_main():
        for name in (RECIPE_FILE, PREDICTIONS_FILE):
            if (policy.run_folder / name).is_file():
                shutil.copyfile(policy.run_folder / name, folder / name)
        if trainer.state.best_global_step is not None and best_folder(policy.root).is_dir():
            atomic.link_folder(best_folder(policy.root), best_folder(folder))


def _data_file(rank: int) -> str:
    """Return the name of the file that holds a process's position in the data."""
    return f"data-{rank}.json"


def _facts(trainer: CheckpointedTrainer) -> dict[str, Any]:
    return {
        "step": trainer.state.global_step,
        "processes": processes.world_size(),
        "seconds": round(trainer.seconds(), 1),
        "ended": trainer.is_finished(),
        "sources": dict(trainer.checkpoint_policy.source_rows),
    }


def _disk_message(folder: Path, root: Path, error: Exception) -> str:
    newest = newest_checkpoint(root)
    last = f"the last checkpoint is {newest}" if newest else "the run has no earlier checkpoint"
    return (
        f"{folder}: cannot write this checkpoint ({error_message(error)}); {last}; "
        "free disk space or choose another train.checkpoint_dir, and resume with --resume"
    )


def check_compatible(folder: Path, source_rows: Mapping[str, int | None]) -> None:
    """Raise UserError if the data or the number of processes differ from those of the checkpoint."""
    record = read_manifest(folder)
    if record["processes"] != processes.world_size():
        raise UserError(
            f"{folder}: written by {record['processes']} processes, got {processes.world_size()}, "
            f"which would change the samples of each batch; resume with {record['processes']}"
        )
    for name, rows in record["sources"].items():
        if name in source_rows and source_rows[name] != rows:
            raise UserError(
                f"{folder}: {name} had {rows} rows when this checkpoint was written, "
                f"got {source_rows[name]}; restore the file, or start a new run in another train.output_dir"
            )


def restore_checkpoint(trainer: CheckpointedTrainer, folder: Path) -> None:
    """Restore trained parameters, position in the data and best adapter; Trainer reads ``training/``."""
    restore_trainable(trainer.unwrapped_model(), folder)
    data_state = (folder / TRAINER_FOLDER / _data_file(processes.rank())).read_text(encoding="utf-8")
    trainer.batches.load_state_dict(json.loads(data_state))
    trainer.earlier_seconds = read_manifest(folder)["seconds"]
    if processes.is_main():
        _restore_best_folder(folder, trainer.checkpoint_policy.root)
    processes.barrier()


def _restore_best_folder(folder: Path, root: Path) -> None:
    """Copy the checkpoint's best adapter, if it has one, back into ``root``."""
    if best_folder(folder).is_dir():
        atomic.begin_folder(best_folder(root)).rmdir()
        atomic.link_folder(best_folder(folder), atomic.partial_path(best_folder(root)))
        atomic.finish_folder(best_folder(root))


def save_sharded_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Write this process's shard of the optimizer state; the main process also writes the schedule."""
    state = optimizer.state_dict()
    shards = {
        index: {name: _local_shard(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    torch.save({"state": shards, "param_groups": state["param_groups"]}, folder / _optimizer_file())
    if processes.is_main():
        torch.save(scheduler.state_dict(), folder / SCHEDULER_FILE)


def load_sharded_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Load what `save_sharded_optimizer` wrote, with the same number of processes."""
    state = torch.load(folder / _optimizer_file(), map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state["state"].items():
        state["state"][index] = {name: _as_sharded(value, parameters[index]) for name, value in entry.items()}
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))


def _optimizer_file() -> str:
    return f"optimizer-{processes.rank()}.pt"


def _local_shard(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _as_sharded(value: Any, parameter: Tensor) -> Any:
    """Wrap a local shard as a DTensor laid out like ``parameter``; step counts stay as they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
