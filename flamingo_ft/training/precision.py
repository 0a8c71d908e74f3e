"""The number format that a run computes in."""

from __future__ import annotations

import torch

from flamingo_ft.backbones.quantization import DTYPES, Quantization
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError

HALF = (torch.float16, torch.bfloat16)


def computes_in(precision: str) -> torch.dtype | None:
    """The format of autocast on this machine, None for none, as train.precision says.

    ``auto`` is bfloat16 where the GPU has it (a T4 only emulates it), float16 on another GPU, none without one.
    """
    if precision != "auto":
        return None if precision == "fp32" else DTYPES[precision]
    if not torch.cuda.is_available():
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_precision(recipe: Recipe) -> None:
    """Refuse what this machine cannot compute, before anything is loaded."""
    wanted = recipe.train.precision
    computed = computes_in(wanted)
    if computed == torch.float16:
        _check_float16(recipe)
    for name in ("vision", "language"):
        quantization = Quantization.of(getattr(recipe.model, name))
        if (
            quantization
            and computed in HALF
            and quantization.dtype in HALF
            and quantization.dtype != computed
        ):
            other = next(word for word, dtype in DTYPES.items() if dtype == computed)
            raise UserError(
                f"model.{name}.compute_dtype: {quantization.compute_dtype} is {_name(quantization.dtype)} here, and "
                f"train.precision: {wanted} is {_name(computed)}; use {other} for both"
            )


def _check_float16(recipe: Recipe) -> None:
    wanted = recipe.train.precision
    if not torch.cuda.is_available():
        raise UserError(
            f"train.precision: {wanted} computes on a GPU, and found none; use fp32, bf16 or auto"
        )
    if recipe.trainable.dtype == "bf16":
        raise UserError(
            f"trainable.dtype: train.precision {wanted} is float16 on this GPU, which wants weights in fp32 beside it; use fp32"
        )
    if recipe.train.optimizer_in_backward:
        raise UserError(
            f"train.optimizer_in_backward: train.precision {wanted} is float16 on this GPU, whose scaled loss cannot be "
            "taken back where it overflows; use train.precision=fp32, or set it to false"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
