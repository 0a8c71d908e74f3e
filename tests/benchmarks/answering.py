"""How fast many prompts are answered: `python -m tests.benchmarks.answering [ADAPTER] [--data FILE]`.

Answers the rows of a file one by one and with `generate --data`, and prints the rows per second of both. By
default, an untrained bridge between the nano backbones answers quickstart's held-out questions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from flamingo_ft.adapters import save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.inference.answers_file import AnswersFile
from flamingo_ft.inference.batch import answer_rows
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.prompts_of_data import Row, Rows
from flamingo_ft.model import build_flamingo

DATA = Path(__file__).parents[2] / "recipes" / "quickstart" / "eval.jsonl"
LENGTH = 16  # tokens of an answer


def untrained(folder: Path) -> Path:
    """Save a bridge between the nano backbones as quickstart begins with, and return its folder."""
    torch.manual_seed(0)
    model, processor = build_flamingo(load_vision("nano"), load_language("nano"), cross_attn_every_n_layers=2)
    save_adapter(model, processor, folder / "adapter")
    return folder / "adapter"


def one_by_one(adapter: str | Path, rows: Sequence[Row]) -> float:
    """Return the seconds that a loop over single prompts takes."""
    predictor = Predictor.from_pretrained(adapter, image_cache_mib=0, max_new_tokens=LENGTH)
    start = time.perf_counter()
    for row in rows:
        assert row.prompt is not None, row.error
        predictor.answer([row.prompt])
    return time.perf_counter() - start


def together(adapter: str | Path, rows: Sequence[Row], file: Path, batch_size: int) -> float:
    """Return the seconds that the same rows take as `generate --data` answers them."""
    predictor = Predictor.from_pretrained(adapter, batch_size=batch_size, max_new_tokens=LENGTH)
    start = time.perf_counter()
    answer_rows(predictor, rows, AnswersFile(file, {}))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("adapter", nargs="?")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    rows = list(islice(Rows(arguments.data), arguments.rows))
    with tempfile.TemporaryDirectory() as folder:
        adapter = arguments.adapter or untrained(Path(folder))
        single = one_by_one(adapter, rows)
        batched = together(adapter, rows, Path(folder) / "answers.jsonl", arguments.batch_size)
    print(f"one by one     {len(rows) / single:8.1f} rows/s")
    print(f"generate --data{len(rows) / batched:8.1f} rows/s, {single / batched:.2f} times as many")


if __name__ == "__main__":
    main()
