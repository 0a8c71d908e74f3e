"""Build the nano backbones: `python -m flamingo_ft.backbones.build_nano FOLDER`.

Writes FOLDER/vision, an OpenCLIP tower trained on the training scans of the quickstart data; FOLDER/language,
a Llama-style language model trained on text about pictures and on no image; and FOLDER/figures.json, what
both can do. Needs scikit-learn for the scans. The same seed, machine and package versions give the same
files.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from open_clip import CLIP
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.backbones.build_nano.corpus import Message, dialogue_messages
from flamingo_ft.backbones.build_nano.digit_questions import KINDS
from flamingo_ft.backbones.build_nano.language_model import (
    encode_corpus,
    make_corpus,
    save_language_model,
    tokenizer_for,
    train_language_model,
)
from flamingo_ft.backbones.build_nano.quickstart_data import Scan, load_scans, split_scans
from flamingo_ft.backbones.build_nano.vision_tower import (
    add_end_token,
    mean_spatial_tokens,
    save_tower,
    train_tower,
)

SEED = 0
TOWER_STEPS = 1000
LANGUAGE_STEPS = 1500
CONVERSATIONS = 60_000
QUESTIONS_PER_KIND = 200
RIDGE = 10.0  # regularization of the linear probe


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the nano backbones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would give other weights
    figures = json.dumps(build(arguments.folder, arguments.seed), indent=2)
    (arguments.folder / "figures.json").write_text(figures + "\n", encoding="utf-8")
    print(figures)


def build(folder: Path, seed: int) -> dict:
    """Build both backbones. Return how long it took and what they can do."""
    start = time.monotonic()
    model, tokenizer = build_language(
        folder / "language", seed=seed, steps=LANGUAGE_STEPS, conversations=CONVERSATIONS
    )
    language = {"seconds": round(time.monotonic() - start), **answer_accuracies(model, tokenizer)}
    start = time.monotonic()
    train_scans, eval_scans = split_scans(load_scans())
    tower = build_vision(folder / "vision", train_scans, tokenizer, seed=seed, steps=TOWER_STEPS)
    vision = {
        "seconds": round(time.monotonic() - start),
        "linear_probe_accuracy": linear_probe_accuracy(tower, train_scans, eval_scans),
    }
    return {"seed": seed, "language": language, "vision": vision}


def build_language(
    folder: Path, *, seed: int, steps: int, conversations: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the language model and its tokenizer, and save both."""
    corpus = make_corpus(seed, conversations)
    tokenizer = tokenizer_for(corpus)
    model = train_language_model(encode_corpus(corpus, tokenizer), tokenizer, seed=seed, steps=steps)
    save_language_model(model, tokenizer, folder)
    return model, tokenizer


def build_vision(
    folder: Path, scans: list[Scan], tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> CLIP:
    """Train the tower on the scans, and save it. Adds the end token to every text of the tokenizer."""
    add_end_token(tokenizer)
    tower = train_tower(scans, tokenizer, seed=seed, steps=steps)
    save_tower(tower, tokenizer, folder)
    return tower


# --- What the backbones can do


def linear_probe_accuracy(tower: CLIP, train_scans: list[Scan], eval_scans: list[Scan]) -> float:
    """Return the evaluation accuracy of a ridge classifier on the mean spatial token before ln_post."""
    train_tokens, eval_tokens = (mean_spatial_tokens(tower, scans) for scans in (train_scans, eval_scans))
    mean, std = train_tokens.mean(0), train_tokens.std(0)
    labels = torch.tensor([scan.digit for scan in train_scans])
    inputs = F.pad((train_tokens - mean) / std, (0, 1), value=1.0)
    ridge = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(ridge, inputs.T @ F.one_hot(labels, 10).float())
    guesses = (F.pad((eval_tokens - mean) / std, (0, 1), value=1.0) @ weights).argmax(1)
    correct = sum(guess == scan.digit for guess, scan in zip(guesses.tolist(), eval_scans, strict=True))
    return round(correct / len(eval_scans), 4)


def answer_accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, float]]:
    """Return the accuracy of last answers for each kind of dialogue, with and without words for pictures."""
    accuracies: dict[str, dict[str, float]] = {"captioned": {}, "blind": {}}
    for name, by_kind in accuracies.items():
        rng = Random(1_000_003)
        for kind in KINDS:
            dialogues = kind.balanced(rng, QUESTIONS_PER_KIND)
            conversations = [dialogue_messages(rng, d, captioned=name == "captioned") for d in dialogues]
            by_kind[kind.make.__name__] = last_answer_accuracy(model, tokenizer, conversations)
    return accuracies


def last_answer_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]
) -> float:
    """Return the fraction of conversations whose last answer is the model's first choice, token by token."""
    questions = [messages[:-1] for messages in conversations]
    encoded: Any = tokenizer.apply_chat_template(questions, add_generation_prompt=True, return_dict=True)
    prompts = encoded["input_ids"]
    answers = tokenizer([c[-1]["content"] + tokenizer.eos_token for c in conversations])["input_ids"]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.no_grad():
        choices = model(input_ids=ids).logits.argmax(-1).tolist()
    correct = 0
    for row, prompt, answer in zip(choices, prompts, answers, strict=True):
        correct += row[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
    return correct / len(conversations)


if __name__ == "__main__":
    main()
