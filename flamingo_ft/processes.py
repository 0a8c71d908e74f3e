"""The processes of a distributed run, one per device. In a single process, no function here communicates.

The processes draw different batches, so an error may occur in one of them alone, and the others would wait
for it forever. Whatever may fail in one process therefore runs inside `raise_together`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from flamingo_ft.errors import ReportedElsewhere, UserError

T = TypeVar("T")


def _state() -> PartialState:
    """Return accelerate's state. Without ``cpu=True``, accelerate ignores the other processes of a run on
    CPUs."""
    return PartialState(cpu=not torch.cuda.is_available())


def rank() -> int:
    """Return the index of this process, from 0."""
    return _state().process_index


def world_size() -> int:
    """Return the number of processes."""
    return _state().num_processes


def is_main() -> bool:
    """Whether this process, of rank 0, writes files and prints."""
    return _state().is_main_process


def default_device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every process has called this."""
    _state().wait_for_everyone()


def any_process(flag: bool) -> bool:
    """Return whether ``flag`` is true in any process. Collective: every process has to call it."""
    if world_size() == 1:
        return flag
    return bool(reduce(torch.tensor(int(flag), device=_state().device), reduction="max"))


def all_gather(value: T) -> list[T]:
    """Return the value of each process, by rank. Collective; values are pickled, so they should be small."""
    return gather_object([value]) if world_size() > 1 else [value]


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of ``items``: every world-size-th of them, beginning at its rank."""
    return items[rank() :: world_size()]


def unshard(results: Sequence[T]) -> list[T]:
    """Return the results of all processes for their `shard` of some items, in the order of the items.
    Collective."""
    shards = all_gather(results)
    merged: list[Any] = [None] * sum(map(len, shards))
    for first, part in enumerate(shards):
        merged[first :: len(shards)] = part
    return merged


@contextmanager
def raise_together() -> Generator[None]:
    """Turn a UserError of any process inside the block into an error of all processes at its end.

    The main process raises the error itself, the others `ReportedElsewhere`. Every process has to enter the
    block, and nothing inside may wait for another process.
    """
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    if not any_process(error is not None):
        return
    messages = all_gather(error and str(error))
    if not is_main():
        raise ReportedElsewhere from error
    if error is not None:
        raise error
    failed = next(number for number, message in enumerate(messages) if message is not None)
    raise UserError(f"process {failed}: {messages[failed]}")


def run_on_main(function: Callable[[], T]) -> T:
    """Run ``function`` in the main process alone and return its result, or raise its UserError, in every
    process."""
    with raise_together():
        result = [function() if is_main() else None]
    return broadcast_object_list(result)[0]
