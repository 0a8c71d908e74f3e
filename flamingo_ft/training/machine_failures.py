"""One-line errors for failures of the machine: out of memory, a full disk, a killed data-loading worker."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.errors import OutOfMemory, UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, error_message, one_line
from flamingo_ft.machine_errors import disk_failure, out_of_memory
from flamingo_ft.plan.plan_report import make_plan_report

from .checkpoints import checkpoint_root, newest_checkpoint

OOM_REMEDIES = {
    "training": "lower train.batch_size or follow the plan below",
    "evaluation": "lower eval.batch_size or eval.max_new_tokens; the plan below is that of a training step",
    "loading": "quantize the backbones, or follow the plan below",
}
WORKER_DIED = "DataLoader worker"  # how torch's error begins


@contextmanager
def oom_as_user_error(activity: str) -> Generator[None]:
    """Raise `OutOfMemory` if memory runs out in the block. activity: a key of ``OOM_REMEDIES``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        description = out_of_memory(error)
        if description is None:
            raise
        raise OutOfMemory(f"{activity}: {description}; {OOM_REMEDIES[activity]}") from None


def attach_memory_plan(error: OutOfMemory, recipe: Recipe) -> OutOfMemory:
    """Return ``error`` with the recipe's memory plan, as `flamingo-ft plan` shows it, if one can be made."""
    error = error.with_traceback(None)
    error.__context__ = None  # the original error's traceback holds every frame, and with them the tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        with oom_as_user_error("training"):
            error.plan = make_plan_report(recipe).record()
    except UserError:  # no memory for the plan either, or a model that cannot be planned
        error.plan = None
    return error


@contextmanager
def io_errors_as_user_error(train_config: TrainSection) -> Generator[None]:
    """Raise UserError for a full disk or a killed worker in the block; `save_checkpoint` reports its own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if str(error).startswith(WORKER_DIED):
            raise UserError(_worker_message(error, train_config)) from error
        failure = disk_failure(error)
        if failure is None:
            raise
        raise UserError(
            f"{train_config.output_dir}: cannot write ({one_line(failure, MAX_MESSAGE_CHARACTERS)}); "
            f"free disk space, and {_how_to_resume(train_config)}"
        ) from error


def _worker_message(error: Exception, train_config: TrainSection) -> str:
    return (
        f"train.num_workers: a data-loading worker died ({error_message(error)}), most likely out of memory; "
        f"lower train.num_workers, or set it to 0, and {_how_to_resume(train_config)}"
    )


def _how_to_resume(train_config: TrainSection) -> str:
    newest = newest_checkpoint(checkpoint_root(train_config))
    return f"resume from {newest} with --resume" if newest else "start again with --resume"
