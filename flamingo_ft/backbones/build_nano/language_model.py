"""The nano language model, a Llama of 4 layers, and its tokenizer; both are trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.backbones.build_nano.corpus import Message, conversation

# --- Tokenizer: byte-level BPE, with a chat template that marks what the assistant says

END_OF_TEXT, START_OF_TURN, END_OF_TURN, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCABULARY_SIZE = 640
MAX_LENGTH = 512
CONVERSATIONS_FOR_TOKENIZER = 20_000

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


def tokenizer_for(corpus: Sequence[Sequence[Message]]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the first conversations of the corpus, roles included."""
    first = corpus[:CONVERSATIONS_FOR_TOKENIZER]
    return train_tokenizer([f"{m['role']}\n{m['content']}" for messages in first for m in messages])


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes any text and decodes it unchanged."""
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
        model_max_length=MAX_LENGTH,
    )


# --- Language model

BATCH_SIZE = 96
LEARNING_RATE = 3e-3
ANSWER_WEIGHT = 5.0  # in the loss: answers are short, and the digits in questions cannot be predicted


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids (T,) and the weight of each in the loss (T,)."""

    ids: list[int]
    weights: list[float]


def make_corpus(seed: int, count: int) -> list[list[Message]]:
    """Return ``count`` random conversations."""
    rng = Random(seed)
    return [conversation(rng) for _ in range(count)]


def encode_corpus(
    corpus: list[list[Message]], tokenizer: PreTrainedTokenizerFast
) -> list[EncodedConversation]:
    """Encode conversations with the chat template; tokens of answers get `ANSWER_WEIGHT`."""
    out: Any = tokenizer.apply_chat_template(
        corpus, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return [
        EncodedConversation(ids, [ANSWER_WEIGHT if is_answer else 1.0 for is_answer in mask])
        for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
    ]


def build_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train_language_model(
    samples: Sequence[EncodedConversation], tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> LlamaForCausalLM:
    """Train the model from random weights."""
    torch.manual_seed(seed)
    model = build_language_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    batches = _batches(samples, Random(seed))
    for _ in range(steps):
        loss = _weighted_loss(model, *_pad(next(batches), tokenizer.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def save_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that transformers' Auto classes load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batches(samples: Sequence[EncodedConversation], rng: Random) -> Iterator[list[EncodedConversation]]:
    """Yield batches without end, each of samples of similar length, which saves padding."""
    group = 8 * BATCH_SIZE
    while True:
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order) - group + 1, group):
            chunk = sorted(order[start : start + group], key=lambda sample: len(sample.ids))
            cut = [chunk[i : i + BATCH_SIZE] for i in range(0, group, BATCH_SIZE)]
            yield from rng.sample(cut, len(cut))


def _pad(batch: Sequence[EncodedConversation], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) and weights (B, T), padded on the right with weight zero."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(s.ids) for s in batch], batch_first=True, padding_value=padding
    )
    weights = nn.utils.rnn.pad_sequence([torch.tensor(s.weights) for s in batch], batch_first=True)
    return ids, weights


def _weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the next-token cross-entropy."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    target_weights = weights[:, 1:].flatten()
    return (losses * target_weights).sum() / target_weights.sum()
