"""How long a text a language model was made for."""

from __future__ import annotations

from transformers import PreTrainedConfig

ENDLESS = 2**31  # the context of a language model that has none
CONTEXT = (
    "max_position_embeddings",
    "max_seq_len",
)  # what configurations call its length; MPT and DBRX the second


def context_length(config: PreTrainedConfig) -> int:
    """The most text tokens that a model's language model was made for; `ENDLESS` where its configuration does not say."""
    text = config.get_text_config()
    return next((length for length in (getattr(text, name, None) for name in CONTEXT) if length), ENDLESS)
