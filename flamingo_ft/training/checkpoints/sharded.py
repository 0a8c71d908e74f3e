"""The optimizer of a sharded model in a checkpoint: each process keeps the state of the part that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flamingo_ft import processes

SCHEDULER = "scheduler.pt"


def save_parts(optimizer: torch.optim.Optimizer, schedule: Any, folder: Path) -> None:
    """Write this process's part of the optimizer's state, and once the schedule."""
    state = optimizer.state_dict()
    entries = {
        number: {name: _part(value) for name, value in one.items()} for number, one in state["state"].items()
    }
    torch.save({"state": entries, "param_groups": state["param_groups"]}, folder / _file())
    if processes.is_main():
        torch.save(schedule.state_dict(), folder / SCHEDULER)


def load_parts(optimizer: torch.optim.Optimizer, schedule: Any, folder: Path) -> None:
    """The inverse of `save_parts`, by as many processes."""
    state = torch.load(folder / _file(), map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state["state"].items():
        state["state"][number] = {name: _joined(value, parameters[number]) for name, value in entries.items()}
    optimizer.load_state_dict(state)
    schedule.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def _file() -> str:
    return f"optimizer-{processes.rank()}.pt"


def _part(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _joined(value: Any, parameter: Tensor) -> Any:
    """A part of a state as that of the whole parameter; counts of steps stay what they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    where = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, **where
    )
