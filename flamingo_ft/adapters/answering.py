"""A model's default generation settings: greedy decoding up to the end of the assistant's turn."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from flamingo_ft.data.encode import end_token_id
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import EOC_TOKEN

from .compat import keep_generation_config

MAX_NEW_TOKENS = 64
SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def use_greedy_decoding(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> None:
    """Make ``model.generate`` decode greedily and stop at the end of an answer; keep its other settings."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    for option in SAMPLING_OPTIONS:
        setattr(config, option, None)
    config.eos_token_id = end_token_ids(model, processor) or None
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.max_new_tokens, config.max_length = MAX_NEW_TOKENS, None
    keep_generation_config(config)
    model.generation_config = config


def end_token_ids(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> list[int]:
    """Return the tokens that end an answer: the model's, the chat template's, and the end of a chunk."""
    return stop_token_ids(processor, model.generation_config.eos_token_id)


def stop_token_ids(processor: FlamingoProcessor, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Return the tokens that end an answer, from the ``eos_token_id`` of a generation configuration."""
    own = [eos_token_id] if eos_token_id is None or isinstance(eos_token_id, int) else eos_token_id
    end_of_chunk = processor.tokenizer.convert_tokens_to_ids(EOC_TOKEN)
    tokens = (*own, _end_in_template(processor), end_of_chunk)
    return sorted({token for token in tokens if token is not None})


def _end_in_template(processor: FlamingoProcessor) -> int | None:
    """Return the token that ends an answer in the chat template; None if the template has none."""
    try:
        return end_token_id(processor)
    except UserError:
        return None
