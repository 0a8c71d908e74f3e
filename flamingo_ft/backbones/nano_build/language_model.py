"""The nano language model: a Llama of 4 layers, trained on the blind corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.backbones.nano_build.corpus import Message, conversation
from flamingo_ft.backbones.nano_build.tokenizer import LONGEST_TEXT, train_tokenizer

CONVERSATIONS_FOR_TOKENIZER = 20_000
BATCH_SIZE = 96
LEARNING_RATE = 3e-3
# Answers are few beside questions, whose digits cannot be foretold: more weight on what can be learned.
WEIGHT_OF_ANSWERS = 5.0


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids (T,) and the weight of each in the loss (T,)."""

    ids: list[int]
    weights: list[float]


def write_corpus(seed: int, count: int) -> list[list[Message]]:
    rng = Random(seed)
    return [conversation(rng) for _ in range(count)]


def tokenizer_for(corpus: Sequence[Sequence[Message]]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the beginning of the corpus, roles included."""
    some = corpus[:CONVERSATIONS_FOR_TOKENIZER]
    return train_tokenizer([f"{m['role']}\n{m['content']}" for messages in some for m in messages])


def encode_corpus(corpus: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    out = tokenizer.apply_chat_template(
        corpus, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return [
        Encoded(ids, [WEIGHT_OF_ANSWERS if said else 1.0 for said in mask])
        for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
    ]


def build_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST_TEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(samples: Sequence[Encoded], rng: Random) -> Iterator[list[Encoded]]:
    """Batches without end; samples of like length come together, which saves padding."""
    group = 8 * BATCH_SIZE
    while True:
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order) - group + 1, group):
            chunk = sorted(order[start : start + group], key=lambda sample: len(sample.ids))
            cut = [chunk[i : i + BATCH_SIZE] for i in range(0, group, BATCH_SIZE)]
            yield from rng.sample(cut, len(cut))


def pad(batch: Sequence[Encoded], padding: int) -> tuple[Tensor, Tensor]:
    """(B, T) token ids and (B, T) weights, padded on the right with weight zero."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(s.ids) for s in batch], batch_first=True, padding_value=padding
    )
    weights = nn.utils.rnn.pad_sequence([torch.tensor(s.weights) for s in batch], batch_first=True)
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy, each token counted by its weight."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def train_language_model(
    samples: Sequence[Encoded], tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = build_language_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    source = batches(samples, Random(seed))
    for _ in range(steps):
        loss = weighted_loss(model, *pad(next(source), tokenizer.pad_token_id))
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
