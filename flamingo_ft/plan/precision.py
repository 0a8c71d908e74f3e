"""The dtypes of a run on the device that is planned for, which need not be this machine's."""

from __future__ import annotations

import torch

from flamingo_ft.backbones.precision import DTYPES, cpu_half_dtype

from .cuda_emulation import Device


def half_dtype(device: Device) -> torch.dtype | None:
    """Return `backbones.precision.half_dtype` of ``device``.

    A GPU is taken to support bfloat16; the float16 that an older one uses instead is as large.
    """
    return torch.bfloat16 if device == "cuda" else cpu_half_dtype()


def autocast_dtype(precision: str, device: Device) -> torch.dtype | None:
    """Return the dtype of the trainer's autocast on ``device``, or None for no autocast."""
    if precision == "auto":
        return half_dtype(device)
    return None if precision == "fp32" else DTYPES[precision]
