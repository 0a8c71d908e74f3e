"""Rounding weights to a narrower dtype without losing any of them to its range."""

from __future__ import annotations

import torch
from torch import Tensor

from flamingo_ft.errors import UserError


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``. Raises UserError, naming ``name``, where a finite value would become infinite:
    float16 ends at 65,504, float32 and bfloat16 at 3.4e38."""
    cast = tensor.to(dtype)
    if cast.is_floating_point() and cast.dtype == torch.float16 and tensor.dtype != torch.float16:
        lost = cast.isinf() & tensor.isfinite()
        if lost.any():
            largest = float(tensor[lost].abs().max())
            raise UserError(
                f"{name}: float16 holds values up to 65,504, got {largest:,.4g}; use bfloat16 (bf16) or float32 (fp32)"
            )
    return cast
