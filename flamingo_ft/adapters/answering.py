"""How a model answers when it is asked for nothing else: greedily, up to the end of what the assistant says."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from flamingo_ft.data.encode import end_token_id
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import EOC_TOKEN

MAX_NEW_TOKENS = 64
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def use_greedy_decoding(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> None:
    """Let plain ``model.generate`` choose and stop as answers are wanted. What else its configuration says stays."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    for option in SAMPLING:
        setattr(config, option, None)
    config.eos_token_id = end_token_ids(model, processor) or None
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.max_new_tokens, config.max_length = MAX_NEW_TOKENS, None
    config._from_model_config = False  # else it would be made anew from what the language model says
    model.generation_config = config


def end_token_ids(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> list[int]:
    """The tokens that end an answer: the language model's own, the chat template's, and the end of a chunk."""
    return stop_token_ids(processor, model.generation_config.eos_token_id)


def stop_token_ids(processor: FlamingoProcessor, own: int | Sequence[int] | None) -> list[int]:
    """The same before there is a model. own: the end tokens of its generation configuration."""
    own = [own] if own is None or isinstance(own, int) else own
    end_of_chunk = processor.tokenizer.convert_tokens_to_ids(EOC_TOKEN)
    return sorted({token for token in (*own, _end_in_template(processor), end_of_chunk) if token is not None})


def _end_in_template(processor: FlamingoProcessor) -> int | None:
    """The token that ends an answer in the chat template; None also for a template that does not show one."""
    try:
        return end_token_id(processor)
    except UserError:
        return None
