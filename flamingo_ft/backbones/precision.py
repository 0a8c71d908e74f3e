"""The dtypes that a recipe's names stand for, and which of them this machine computes in."""

from __future__ import annotations

import torch

from flamingo_ft.errors import UserError

from .compat import cpu_has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_half_dtype() -> torch.dtype | None:
    """Return bfloat16 if the processor has instructions for it (AMX or AVX-512 BF16), else None."""
    return torch.bfloat16 if cpu_has_bf16() else None


def half_dtype() -> torch.dtype | None:
    """Return the 16-bit dtype in which this machine multiplies matrices faster than in float32.

    bfloat16 on a GPU that supports it natively (a T4 only emulates it), float16 on any other GPU; without a
    GPU, `cpu_half_dtype`.
    """
    if not torch.cuda.is_available():
        return cpu_half_dtype()
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the autocast dtype for ``train.precision`` on this machine; None for float32 without autocast.

    ``auto`` is `half_dtype`.
    """
    if precision == "auto":
        return half_dtype()
    return None if precision == "fp32" else DTYPES[precision]


def frozen_dtype(autocast: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of unquantized frozen backbones beside an autocast dtype; None: as they are stored.

    Autocast would convert frozen float32 matrices to bfloat16 at every use. float16, whose range is small, is
    left to autocast.
    """
    return torch.bfloat16 if autocast == torch.bfloat16 else None


def inference_dtype(dtype: str) -> torch.dtype | None:
    """Return the dtype of a model that only answers, for a name of `DTYPES` or ``auto``; None: as loaded.

    ``auto`` is bfloat16 where this machine has instructions for it, and float32 on any other CPU, where other
    dtypes are slow. Raises UserError for another name.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype: must be one of auto, {', '.join(DTYPES)}, got {dtype}")
    if dtype != "auto":
        return DTYPES[dtype]
    half = half_dtype()
    if half is None:
        return torch.float32
    return frozen_dtype(half)
