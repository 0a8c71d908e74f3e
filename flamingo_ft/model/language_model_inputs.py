"""How to call a language model: the name of its cache argument, and how packed rows are masked.

Shapes: B rows, T text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# What language models call their key/value cache. transformers models since 5.24 use the first name, older
# ones and remote code the second, state-space models the third, RWKV the last.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state")

# Families whose position embeddings or ALiBi slopes suit packed rows, but whose attention mask does not
# follow from position_ids: they get the whole mask. None of them has sliding-window layers.
NEEDS_DOCUMENT_MASK = ("biogpt", "mosaic_gpt", "mpt", "opt", "xglm")

# Families that reset their state when they read several tokens after a cache, instead of continuing from it.
READS_ONE_TOKEN_AFTER_CACHE = ("falcon_mamba", "mamba")

# Families whose ``generate`` gives other logits for a text whose beginning is in the cache; the Mambas read
# the beginning again (transformers 5.24).
CANNOT_CONTINUE_CACHE = ("deepseek_v4", "falcon_mamba", "mamba", "mamba2", "moshi", "recurrent_gemma")


def get_cache(values: Mapping[str, object] | tuple) -> object | None:
    """Return the cache among a forward's keyword arguments or a model's outputs, if there is one."""
    if not isinstance(values, Mapping):
        return next((value for value in values if hasattr(value, "get_seq_length")), None)
    caches = (value for name, value in values.items() if name in CACHE_ARGUMENTS)
    return next((cache for cache in caches if cache is not None), None)


def name_cache(lm: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``inputs``, their cache, if any, under the name that the ``forward`` of ``lm`` has for it."""
    others = {name: value for name, value in inputs.items() if name not in CACHE_ARGUMENTS}
    cache = get_cache(inputs)
    if cache is None:
        return others
    known = inspect.signature(lm.forward).parameters
    return {**others, next((name for name in CACHE_ARGUMENTS if name in known), "past_key_values"): cache}


def language_model_inputs(
    lm: PreTrainedModel, inputs: Mapping[str, Any], document_ids: Tensor | None = None
) -> dict[str, Any]:
    """Return the ``inputs`` for ``lm`` that are not None, with the mask that packed documents need.

    document_ids (B, T): transformers separates documents by position_ids that restart with each, and only
    without a mask and a cache. Raises ValueError where these are among the inputs, or position_ids are
    not.
    """
    inputs = name_cache(lm, {name: value for name, value in inputs.items() if value is not None})
    if document_ids is None:
        return inputs
    if "position_ids" not in inputs or "attention_mask" in inputs or get_cache(inputs) is not None:
        raise ValueError("document_ids: need position_ids, and no attention_mask or cache")
    if lm.config.model_type in NEEDS_DOCUMENT_MASK:
        inputs["attention_mask"] = document_mask(document_ids, lm.dtype)
    return {**inputs, "use_cache": False}


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask (B, 1, T, T) of packed documents.

    It is zero for a token itself and the earlier tokens of its document, and the lowest value of ``dtype``
    for all others.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    hidden = ~same.tril()[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
        hidden, torch.finfo(dtype).min
    )
