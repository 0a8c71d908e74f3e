"""Make the nano backbones: `python -m flamingo_ft.backbones.build_nano FOLDER`.

Writes FOLDER/vision, an OpenCLIP tower trained on the training scans of the quickstart data, and
FOLDER/language, a Llama-style language model that has read about pictures and never seen one, with
`figures.json` beside them. Needs scikit-learn for the scans. The same seed, machine and package versions give
the same files.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from open_clip import CLIP
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.backbones.nano_build.digits import Scan, load_scans, split_scans
from flamingo_ft.backbones.nano_build.figures import answers_in_words, linear_probe
from flamingo_ft.backbones.nano_build.language_model import (
    encode_corpus,
    save_language_model,
    tokenizer_for,
    train_language_model,
    write_corpus,
)
from flamingo_ft.backbones.nano_build.tower import save_tower, train_tower, with_end_token

SEED = 0
TOWER_STEPS = 1000
LANGUAGE_STEPS = 1500
CONVERSATIONS = 60_000


def build_language(
    folder: Path, *, seed: int, steps: int, conversations: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the language model and its tokenizer, and save both."""
    corpus = write_corpus(seed, conversations)
    tokenizer = tokenizer_for(corpus)
    model = train_language_model(encode_corpus(corpus, tokenizer), tokenizer, seed=seed, steps=steps)
    save_language_model(model, tokenizer, folder)
    return model, tokenizer


def build_vision(
    folder: Path, scans: list[Scan], tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> CLIP:
    """Train the tower on the scans, and save it; the tokenizer closes every text from then on."""
    with_end_token(tokenizer)
    tower = train_tower(scans, tokenizer, seed=seed, steps=steps)
    save_tower(tower, tokenizer, folder)
    return tower


def build(folder: Path, seed: int) -> dict:
    """Build both, and return how long it took and what they can do."""
    began = time.monotonic()
    model, tokenizer = build_language(
        folder / "language", seed=seed, steps=LANGUAGE_STEPS, conversations=CONVERSATIONS
    )
    language = {"seconds": round(time.monotonic() - began), **answers_in_words(model, tokenizer)}
    began = time.monotonic()
    train, held_out = split_scans(load_scans())
    tower = build_vision(folder / "vision", train, tokenizer, seed=seed, steps=TOWER_STEPS)
    vision = {"seconds": round(time.monotonic() - began), **linear_probe(tower, train, held_out)}
    return {"seed": seed, "language": language, "vision": vision}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the nano backbones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would end in other weights
    figures = json.dumps(build(given.folder, given.seed), indent=2)
    (given.folder / "figures.json").write_text(figures + "\n", encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    main()
