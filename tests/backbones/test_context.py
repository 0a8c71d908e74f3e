"""How long a text a language model was made for."""

import pytest
from transformers import BloomConfig, GPT2Config, MptConfig, OPTConfig

from flamingo_ft.backbones.context import ENDLESS, context_length


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (OPTConfig(max_position_embeddings=64), 64),
        (MptConfig(max_seq_len=32), 32),
        (GPT2Config(n_positions=16), 16),
        (BloomConfig(), ENDLESS),
    ],
)
def test_the_context_is_what_the_language_model_was_made_for(config, length):
    assert context_length(config) == length
