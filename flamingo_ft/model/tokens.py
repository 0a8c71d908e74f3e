"""The tokens that a Flamingo adds to its language model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEDIA_TOKEN = "<image>"
EOC_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"  # OpenFlamingo's choice where a tokenizer has none


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
