"""Rows that hold several documents: what the language model is told of them.

Shapes: B rows, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .conditioning import cache_in

# Families whose positions or slopes (ALiBi) suit packed rows, and that build their mask without a look at positions:
# they get the whole mask. None of them has layers that see a window alone.
TAKE_A_MASK = ("biogpt", "mosaic_gpt", "mpt", "opt", "xglm")


def for_language_model(
    lm: PreTrainedModel, given: Mapping[str, Any], document_ids: Tensor | None
) -> dict[str, Any]:
    """The arguments that are not None; for documents (B, T), with what keeps them apart in self-attention.

    transformers tells documents apart by positions that begin anew with each, and only where there is neither a mask
    nor a cache. Raises ValueError where these are given, or no positions.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if document_ids is None:
        return given
    if "position_ids" not in given or "attention_mask" in given or cache_in(given) is not None:
        raise ValueError("document_ids go with position_ids, and without attention_mask and past_key_values")
    if lm.config.model_type in TAKE_A_MASK:
        given["attention_mask"] = document_mask(document_ids, lm.dtype)
    return {**given, "use_cache": False}


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, (B, 1, T, T): nothing for earlier tokens of the same document and itself, the
    lowest number for others."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    others = ~same.tril()[:, None]
    return torch.zeros(others.shape, dtype=dtype, device=others.device).masked_fill(
        others, torch.finfo(dtype).min
    )
