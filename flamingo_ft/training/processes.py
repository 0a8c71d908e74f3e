"""The processes that train together, one for each device; alone, all of this is nothing."""

from __future__ import annotations

import torch
from accelerate import PartialState


def rank() -> int:
    """This process's number, from 0."""
    return PartialState().process_index


def world_size() -> int:
    """How many processes train together."""
    return PartialState().num_processes


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return PartialState().is_main_process


def barrier() -> None:
    """Wait until every process is here."""
    PartialState().wait_for_everyone()


def agree(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all have to ask."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=PartialState().device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)
