"""The processes that train together, one for each device; alone, all of this is nothing.

What differs between them is a batch, and with it an error: an error of one process alone would leave the others waiting
for it, so what may fail in one is done inside `failing_together`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from flamingo_ft.errors import ToldElsewhere, UserError

T = TypeVar("T")


def _state() -> PartialState:
    """Of accelerate, which without a word on CPUs takes each process there for the only one."""
    return PartialState(cpu=not torch.cuda.is_available())


def rank() -> int:
    """This process's number, from 0."""
    return _state().process_index


def world_size() -> int:
    """How many processes train together."""
    return _state().num_processes


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _state().is_main_process


def barrier() -> None:
    """Wait until every process is here."""
    _state().wait_for_everyone()


def agree(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all have to ask."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=_state().device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)


def everyones(value: T) -> list[T]:
    """What each process has, by rank; all have to ask. The values go through pickle, so they should be small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``, every world-size-th of them."""
    return items[rank() :: world_size()]


def joined(parts: T) -> list:
    """The inverse of `share`: what the processes made of their parts, in the order of the whole."""
    whole = [None] * sum(map(len, found := everyones(parts)))
    for number, part in enumerate(found):
        whole[number :: len(found)] = part
    return whole


@contextmanager
def failing_together() -> Iterator[None]:
    """A UserError of any process inside the block becomes one of all at its end; the main one tells it.

    All have to come here, and there may be nothing inside that waits for another process.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if not agree(error is not None):
        return
    errors = everyones(error and str(error))
    if not is_main():
        raise ToldElsewhere from error
    raise error or UserError(_of_another(errors))


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, for all; it runs in no other."""
    with failing_together():
        made = make() if is_main() else None
    return everyones(made)[0]


def _of_another(errors: list[str | None]) -> str:
    number, message = next((number, message) for number, message in enumerate(errors) if message is not None)
    return f"process {number}: {message}"
