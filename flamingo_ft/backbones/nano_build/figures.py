"""What the nano backbones can do, measured: a linear probe of the tower, answers of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import open_clip
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.backbones.nano_build.corpus import Message, messages_of
from flamingo_ft.backbones.nano_build.digits import Scan
from flamingo_ft.backbones.nano_build.language_of_digits import KINDS
from flamingo_ft.backbones.nano_build.tower import spatial_means

QUESTIONS_PER_KIND = 200


def linear_probe(tower: open_clip.CLIP, train: list[Scan], held_out: list[Scan]) -> dict[str, float]:
    """Accuracy on held-out scans of a ridge classifier on the mean spatial token before ln_post."""
    seen, unseen = spatial_means(tower, train), spatial_means(tower, held_out)
    mean, std = seen.mean(0), seen.std(0)
    labels = torch.tensor([scan.digit for scan in train])
    inputs = F.pad((seen - mean) / std, (0, 1), value=1.0)
    ridge = inputs.T @ inputs + 10.0 * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(ridge, inputs.T @ F.one_hot(labels, 10).float())
    guesses = (F.pad((unseen - mean) / std, (0, 1), value=1.0) @ weights).argmax(1)
    right = sum(guess == scan.digit for guess, scan in zip(guesses.tolist(), held_out, strict=True))
    return {"linear_probe_accuracy": round(right / len(held_out), 4)}


def answers_in_words(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, float]]:
    """Share of last answers that are right, per kind of dialogue, with words at the pictures and without."""
    found: dict[str, dict[str, float]] = {"captioned": {}, "blind": {}}
    for name, shares in found.items():
        rng = Random(1_000_003)
        for kind in KINDS:
            asked = [messages_of(rng, d, name == "captioned") for d in kind.balanced(rng, QUESTIONS_PER_KIND)]
            shares[kind.make.__name__] = share_right(model, tokenizer, asked)
    return found


def share_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> float:
    """Share of conversations whose last answer is, token by token, what the model would have said."""
    asked = [messages[:-1] for messages in conversations]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    answers = tokenizer([c[-1]["content"] + tokenizer.eos_token for c in conversations])["input_ids"]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.no_grad():
        guesses = model(input_ids=ids).logits.argmax(-1).tolist()
    said = [
        row[len(p) - 1 : len(p) + len(a) - 1] for row, p, a in zip(guesses, prompts, answers, strict=True)
    ]
    return sum(s == a for s, a in zip(said, answers, strict=True)) / len(conversations)
