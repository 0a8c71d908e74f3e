"""The tokens that a Flamingo adds to its language model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flamingo_ft.errors import UserError

from .core import FlamingoCore
from .token_rows import TokenRows

MEDIA_TOKEN = "<image>"
EOC_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"  # OpenFlamingo's choice where a tokenizer has none

WHERE = "resize_token_embeddings"
AT_FIRST = "add tokens when the model is built, build_flamingo(..., extra_tokens=[...])"


def add_media_tokens(tokenizer: PreTrainedTokenizerBase, extra: Sequence[str] = ()) -> list[int]:
    """Add the end-of-chunk, media, ``extra`` and, where there is none, padding token, in this order; returns the ids that
    were not there."""
    known = set(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": [EOC_TOKEN, MEDIA_TOKEN, *extra]}, False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    vocabulary = tokenizer.get_vocab()
    return sorted(
        vocabulary[t] for t in (MEDIA_TOKEN, EOC_TOKEN, *extra, tokenizer.pad_token) if t not in known
    )


@torch.no_grad()
def grow_vocabulary(lm: PreTrainedModel, size: int) -> None:
    """Give the language model's matrices at least ``size`` rows, the added ones at the mean of the others.

    So too the bias of its output head, where it has one.
    """
    rows = len(lm.get_input_embeddings().weight)
    if size <= rows:
        return
    lm.resize_token_embeddings(size, mean_resizing=False)
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    for parameter in (embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None)):
        if parameter is not None:
            parameter[rows:] = parameter[:rows].float().mean(0)


def add_tokens(model: FlamingoCore, size: int) -> None:
    """Let ``model`` have tokens up to ``size``, those that it did not have in `token_rows`.

    Tokens are numbered in the order in which they are added to a tokenizer, so all from the last known on are new.
    Without rows of its own (its tokenizer had ``<image>`` before), the new ones are those beyond the language model's.
    """
    config, lm = model.config, model.lang_encoder
    own = config.new_token_ids or []
    used = 1 + max([config.media_token_id, config.eoc_token_id, *own])
    if size < used:
        raise UserError(
            f"{WHERE}: cannot drop tokens that are in use, got {size} tokens where <image> and others need {used}; "
            "pass len(tokenizer)"
        )
    first = used if own else len(lm.get_input_embeddings().weight)
    added = list(range(first, size))
    if not added:
        return
    _check_rows_can_be_added(model)
    grow_vocabulary(lm, size)
    if model.token_rows is None:
        model.token_rows = (
            TokenRows(added, lm).to(lm.get_input_embeddings().weight.device).requires_grad_(False)
        )
        model.token_rows.attach(lm, model.conditioning)
        model.token_rows.copy_from(lm)
    else:
        model.token_rows.extend(added, lm)
    config.new_token_ids = [*own, *added]


def _check_rows_can_be_added(model: FlamingoCore) -> None:
    """Refuse where parameters of another shape would not reach what holds the old ones, or not load again."""
    rows = model.token_rows
    if isinstance(model, FSDPModule):
        raise UserError(f"{WHERE}: the model is sharded; {AT_FIRST}, or add them before it is sharded")
    if rows is not None and any(type(table) is not nn.Embedding for table in rows.children()):
        raise UserError(f"{WHERE}: PEFT has wrapped the rows of new tokens; {AT_FIRST}, or add them before")
    if model.config.bridge_init:
        raise UserError(
            f"{WHERE}: the bridge was started from {model.config.bridge_init['path']}, which has no rows for more "
            "tokens; merge it, or train a bridge with these tokens"
        )


def check_embeddings(module: object, rows: TokenRows | None, where: str) -> None:
    """Refuse what is no module with a row for each token that ``rows`` stand in for."""
    needed = 1 + max(rows.token_ids) if rows is not None else 0
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{where}: needs a torch module, got {type(module).__name__}; pass a layer such as the language model's "
            "own (lang_encoder)"
        )
    if len(module.weight) < needed:
        raise UserError(
            f"{where}: needs at least {needed} rows, got {len(module.weight)}; add the tokens' rows to it"
        )
