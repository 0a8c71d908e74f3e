"""The number format that a run computes in."""

from __future__ import annotations

import torch


def computes_in_bf16(precision: str) -> bool:
    """Whether to compute in bfloat16; ``auto`` does so where the GPU has it (a T4 only emulates it)."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"
