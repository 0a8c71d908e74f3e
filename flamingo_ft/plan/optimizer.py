"""What an optimizer keeps for a parameter, from the second step on.

torch.optim.AdamW keeps two moments in the parameter's dtype. bitsandbytes 0.50.2, optim/optimizer.py, keeps them in
float32, or as bytes with a float32 scale per 256 where a parameter has 4096 elements or more; paged optimizers keep
those of 100,000 elements or more where the driver may move them to the computer's memory.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .devices import Device

SMALLEST_8BIT, SMALLEST_PAGED, STATE_BLOCK = 4096, 100_000, 256  # elements


def optimizer_state(parameter: Tensor, optimizer: str, device: Device) -> tuple[list[Tensor], int]:
    """The state of one parameter as tensors on the device, and the bytes that are paged."""
    kept = _kept(parameter, optimizer)
    moments, scales = kept[:2], kept[2:]
    if optimizer.startswith("paged_") and device == "cuda" and parameter.numel() >= SMALLEST_PAGED:
        return scales, sum(moment.nbytes for moment in moments)
    return kept, 0


def _kept(parameter: Tensor, optimizer: str) -> list[Tensor]:
    """Two moments, then their scales."""
    if optimizer == "adamw":
        return [torch.empty_like(parameter) for _ in range(2)]
    if not optimizer.endswith("8bit") or parameter.numel() < SMALLEST_8BIT:
        return [torch.empty_like(parameter, dtype=torch.float32) for _ in range(2)]
    moments = [torch.empty_like(parameter, dtype=torch.uint8) for _ in range(2)]
    blocks = ceil(parameter.numel() / STATE_BLOCK)
    return moments + [parameter.new_empty(blocks, dtype=torch.float32) for _ in range(2)]
