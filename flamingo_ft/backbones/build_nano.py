"""Make the nano backbones: `python -m flamingo_ft.backbones.build_nano FOLDER`.

Writes FOLDER/vision, an OpenCLIP tower trained on the training scans of the quickstart data, and FOLDER/language, a
Llama-style language model that has read about pictures and never seen one, with `figures.json` beside them. Needs
scikit-learn for the scans. The same seed, machine and package versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from flamingo_ft.backbones.nano_build.digits import load_scans, split_scans
from flamingo_ft.backbones.nano_build.figures import answers_in_words, linear_probe
from flamingo_ft.backbones.nano_build.language_model import (
    CONVERSATIONS,
    encode_corpus,
    save_language_model,
    tokenizer_for,
    train_language_model,
    write_corpus,
)
from flamingo_ft.backbones.nano_build.tower import save_tower, train_tower, with_end_token

SEED = 0
TOWER_STEPS = 1200
LANGUAGE_STEPS = 1500

T = TypeVar("T")


def timed(name: str, seconds: dict[str, float], make: Callable[[], T]) -> T:
    """What `make` returns; how long it took goes into `seconds`."""
    began = time.monotonic()
    made = make()
    seconds[name] = round(time.monotonic() - began, 1)
    print(f"{name}: {seconds[name]} s")
    return made


def build(
    folder: Path, *, seed: int, tower_steps: int, language_steps: int, conversations: int = CONVERSATIONS
) -> dict:
    """Train both backbones and save them; returns and writes their figures."""
    seconds: dict[str, float] = {}
    corpus = timed("corpus", seconds, lambda: write_corpus(seed, conversations))
    tokenizer = tokenizer_for(corpus)
    samples = encode_corpus(corpus, tokenizer)
    language = timed(
        "language", seconds, lambda: train_language_model(samples, tokenizer, seed=seed, steps=language_steps)
    )
    save_language_model(language, tokenizer, folder / "language")
    train, held_out = split_scans(load_scans())
    with_end_token(tokenizer)
    tower = timed("vision", seconds, lambda: train_tower(train, tokenizer, seed=seed, steps=tower_steps))
    save_tower(tower, tokenizer, folder / "vision")
    figures = {
        "seed": seed,
        "seconds": seconds,
        "vision": linear_probe(tower, train, held_out),
        "language": answers_in_words(language, folder / "language"),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the nano backbones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = build(
        given.folder, seed=given.seed, tower_steps=given.tower_steps, language_steps=given.language_steps
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
