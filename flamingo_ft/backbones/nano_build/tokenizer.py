"""The nano tokenizer: byte-level BPE with a chat template that marks what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, START_OF_TURN, END_OF_TURN, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCABULARY_SIZE = 640
LONGEST_TEXT = 512

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- set words = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set words.text = message['content'] %}
    {%- else %}
        {%- for block in message['content'] %}
            {%- if block['type'] != 'text' %}
                {{- raise_exception('this language model reads text alone; found ' + block['type']) }}
            {%- endif %}
            {%- set words.text = words.text + block['text'] %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- words.text + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- words.text + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: with every byte in its vocabulary it encodes any text and gives it back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        bos_token=None,
        pad_token=PADDING,
        additional_special_tokens=[START_OF_TURN, END_OF_TEXT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST_TEXT,
    )
