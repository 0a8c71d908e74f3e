"""What a machine does to a run, told in a line: a disk that takes no more, a process beside it that was killed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError, one_line

from .checkpoints import checkpoint_root, checkpoints

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # what a disk says that takes no more
WORKER_DIED = "DataLoader worker"  # how torch's error begins


@contextmanager
def told_if_hindered(wanted: TrainSection) -> Iterator[None]:
    """A full disk under the output folder and a killed worker process become a UserError; checkpoints have their own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        found = f"{wanted.output_dir}: cannot be written to ({one_line(error)})"
        raise UserError(f"{found}; make room there, and {_go_on(wanted)}") from error
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        raise UserError(
            f"train.num_workers: a process that prepares batches ended ({one_line(error)}), most likely for want of "
            f"memory; lower train.num_workers, or set it to 0, and {_go_on(wanted)}"
        ) from error


def _go_on(wanted: TrainSection) -> str:
    newest = next(iter(checkpoints(checkpoint_root(wanted)).values()), None)
    return f"go on from {newest} with --resume" if newest else "begin again with --resume"
