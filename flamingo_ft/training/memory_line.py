"""What a run is planned to need, beside what is free, before anything is loaded."""

from __future__ import annotations

import psutil
import torch

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError

from .plan.gpus import CONTEXT, FRAGMENTATION
from .plan.memory import plan_memory

GIB = 2**30


def memory_line(recipe: Recipe) -> str:
    """One line that compares the planned peak with the memory that is free on the device of this process."""
    device = default_device()
    if recipe.train.fsdp:
        return "memory: not planned, train.fsdp spreads the weights over the processes"
    try:
        peak = plan_memory(recipe, device="cuda" if device.type == "cuda" else "cpu").peak
    except UserError as error:
        return f"memory: not planned ({error})"
    if device.type == "cuda":
        peak, owner = peak * (1 + FRAGMENTATION) + CONTEXT, f"on {torch.cuda.get_device_name(device)}"
        free = torch.cuda.mem_get_info(device)[0]
    else:
        owner, free = "of host RAM", psutil.virtual_memory().available
    line = f"memory: planned peak {peak / GIB:.2f} GiB, {free / GIB:.2f} GiB {owner} are free"
    return line if peak <= free else f"warning: {line}; flamingo-ft plan says what to change"
