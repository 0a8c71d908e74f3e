"""What the nano backbones can do, measured: a linear probe of the tower, and the language model's answers in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import open_clip
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

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


def answers_in_words(model: LlamaForCausalLM, folder: Path) -> dict[str, dict[str, float]]:
    """Share of last answers that are right, per kind of dialogue: with words at the pictures' places, and without."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
    right = 0
    for messages in conversations:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(conversations)
