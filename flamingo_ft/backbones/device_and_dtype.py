"""The default device, and casts that do not overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from flamingo_ft.errors import UserError


def default_device() -> torch.device:
    """Return this process's current GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def cast_in_range(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``. Raises UserError, naming ``name``, if a finite value becomes infinite.

    float16 ends at 65,504, float32 and bfloat16 at 3.4e38.
    """
    cast = tensor.to(dtype)
    if cast.dtype == torch.float16 and tensor.dtype != torch.float16:
        overflowed = cast.isinf() & tensor.isfinite()
        if overflowed.any():
            largest = float(tensor[overflowed].abs().max())
            raise UserError(
                f"{name}: float16 holds values up to 65,504, got {largest:,.4g}; "
                "use bfloat16 (bf16) or float32 (fp32)"
            )
    return cast
