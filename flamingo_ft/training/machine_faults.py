"""Errors of the machine that end a run, reported in a line: a full disk, a worker process that was killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, error_message, one_line
from flamingo_ft.machine_errors import disk_failure

from .checkpoints import checkpoint_root, checkpoints

WORKER_DIED = "DataLoader worker"  # how torch's error begins


@contextmanager
def io_errors_as_user_error(train: TrainSection) -> Iterator[None]:
    """A full disk and a killed worker process become a UserError; checkpoints have their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if str(error).startswith(WORKER_DIED):
            raise UserError(_worker_died(error, train)) from error
        full = disk_failure(error)
        if full is None:
            raise
        found = f"{train.output_dir}: cannot write ({one_line(full, MAX_MESSAGE_CHARACTERS)})"
        raise UserError(f"{found}; make room on that disk, and {_resume(train)}") from error


def _worker_died(error: Exception, train: TrainSection) -> str:
    return (
        f"train.num_workers: a process that prepares batches ended ({error_message(error)}), most likely for lack of "
        f"memory; lower train.num_workers, or set it to 0, and {_resume(train)}"
    )


def _resume(train: TrainSection) -> str:
    newest = next(iter(checkpoints(checkpoint_root(train)).values()), None)
    return f"resume from {newest} with --resume" if newest else "start again with --resume"
