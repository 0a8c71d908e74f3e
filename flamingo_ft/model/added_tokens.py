"""The tokens that a Flamingo adds to its language model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flamingo_ft.errors import UserError

from .token_rows import TokenRows, input_embedding, output_head

MEDIA_TOKEN = "<image>"
EOC_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"  # OpenFlamingo's choice where a tokenizer has none

WHERE = "resize_token_embeddings"
ADVICE = "add tokens when the model is built, build_flamingo(..., extra_tokens=[...])"


def add_media_tokens(tokenizer: PreTrainedTokenizerBase, extra: Sequence[str] = ()) -> list[int]:
    """Add the end-of-chunk and media tokens, ``extra``, and a padding token if the tokenizer lacks one.

    Returns the ids of those that the vocabulary did not have.
    """
    known = set(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": [EOC_TOKEN, MEDIA_TOKEN, *extra]}, False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    vocabulary = tokenizer.get_vocab()
    tokens = (MEDIA_TOKEN, EOC_TOKEN, *extra, str(tokenizer.pad_token))
    return sorted(vocabulary[token] for token in tokens if token not in known)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one token."""
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


@torch.no_grad()
def grow_vocabulary(lm: PreTrainedModel, size: int) -> None:
    """Grow the language model's embedding and output head, bias included, to at least ``size`` rows.

    Added rows are the mean of the others.
    """
    rows = len(input_embedding(lm).weight)
    if size <= rows:
        return
    lm.resize_token_embeddings(size, mean_resizing=False)
    embeddings, head = input_embedding(lm), output_head(lm)
    for parameter in (embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None)):
        if parameter is not None:
            parameter[rows:] = parameter[:rows].float().mean(0)


def add_tokens(model: Any, size: int) -> None:
    """Add tokens to ``model``, a `FlamingoForConditionalGeneration`, up to a vocabulary of ``size``.

    A tokenizer numbers tokens in the order in which they are added, so all ids after the last known one are
    new. Their rows go into `token_rows`. If the model has no rows of its own (its tokenizer had ``<image>``
    before), they are those beyond the language model's matrix.
    """
    config, lm = model.config, model.lang_encoder
    own = config.new_token_ids or []
    used = 1 + max([config.media_token_id, config.eoc_token_id, *own])
    if size < used:
        raise UserError(
            f"{WHERE}: cannot drop tokens in use, got {size} tokens where <image> and others need {used}; "
            "pass len(tokenizer)"
        )
    first = used if own else len(input_embedding(lm).weight)
    added = list(range(first, size))
    if not added:
        return
    _check_rows_can_be_added(model)
    grow_vocabulary(lm, size)
    if model.token_rows is None:
        model.token_rows = TokenRows(added, lm).to(input_embedding(lm).weight.device).requires_grad_(False)
        model.token_rows.attach(lm, model.conditioning)
        model.token_rows.copy_from(lm)
    else:
        model.token_rows.extend(added, lm)
    config.new_token_ids = [*own, *added]


def _check_rows_can_be_added(model: Any) -> None:
    """Raise UserError if rows can no longer be added.

    That is so if the parameters are sharded or wrapped, or if the adapter could not be loaded again.
    """
    rows = model.token_rows
    if isinstance(model, FSDPModule):
        raise UserError(f"{WHERE}: the model is sharded; {ADVICE}, or add them before it is sharded")
    if rows is not None and any(type(table) is not nn.Embedding for table in rows.children()):
        raise UserError(f"{WHERE}: PEFT has wrapped the rows of new tokens; {ADVICE}, or add them before")
    if model.config.bridge_init:
        raise UserError(
            f"{WHERE}: the bridge was started from {model.config.bridge_init['path']}, which has no rows "
            "for more tokens; merge it first, or train a new bridge with these tokens"
        )


def check_embeddings(module: Any, rows: TokenRows | None, where: str) -> None:
    """Raise UserError unless ``module`` is a torch module with a row for every token of ``rows``."""
    needed = 1 + max(rows.token_ids) if rows is not None else 0
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{where}: needs a torch module, got {type(module).__name__}; pass one like lang_encoder's own"
        )
    weight: Any = module.weight
    if len(weight) < needed:
        raise UserError(
            f"{where}: needs at least {needed} rows, got {len(weight)}; add the tokens' rows to it"
        )
