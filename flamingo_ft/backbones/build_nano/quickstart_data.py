"""Write the quickstart data: `python -m flamingo_ft.backbones.build_nano.quickstart_data FOLDER`.

FOLDER/images/*.png, FOLDER/train.jsonl and FOLDER/eval.jsonl look like any user's own instruction data. The
two splits share no scan. FOLDER/preferences.jsonl and FOLDER/preferences_eval.jsonl ask the last question of
their first rows again, with the right answer preferred to a wrong one of the same kind.

The pictures are the 1,797 scans of digits that scikit-learn carries: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), https://doi.org/10.24432/C50P49,
CC BY 4.0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from flamingo_ft.backbones.build_nano.digit_questions import (
    DIGIT_WORDS,
    KINDS,
    Dialogue,
    Part,
    Picture,
    endless,
    sentence,
)

SEED = 0

# Rows for each of KINDS, in their order; every count is a multiple of what balances the answers exactly.
TRAIN_ROWS = (900, 600, 600, 1400, 1600, 400, 400, 500, 800)
EVAL_ROWS = (200, 200, 240, 200, 200, 50, 48, 50, 52)
PREFERENCES = {  # source: (file with preferences, number of rows)
    "train.jsonl": ("preferences.jsonl", 800),
    "eval.jsonl": ("preferences_eval.jsonl", 300),
}


# --- Scans

SPLIT_SEED = 0
EVAL_SCANS_PER_DIGIT = 36
SIDE = 32
LEVELS = 16


@dataclass(frozen=True)
class Scan:
    """One scan: `number` counts from 1 in scikit-learn's order; `pixels` is (8, 8) with values 0 to 16."""

    number: int
    digit: int
    pixels: np.ndarray

    @property
    def file_name(self) -> str:
        return f"images/{self.number:04d}.png"

    def picture(self) -> Image.Image:
        """Return a grayscale image of 32 x 32 pixels, white ink on black, resized bicubically."""
        gray = np.round(self.pixels * (255 / LEVELS)).astype(np.uint8)
        return Image.fromarray(gray).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def load_scans() -> list[Scan]:
    """Load all scans in scikit-learn's order; the only function that needs scikit-learn."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pairs = zip(data.images, data.target, strict=True)
    return [Scan(i + 1, int(digit), pixels) for i, (pixels, digit) in enumerate(pairs)]


def split_scans(scans: list[Scan]) -> tuple[list[Scan], list[Scan]]:
    """Return (training scans, evaluation scans): 36 of each digit, chosen by a fixed seed, are held out.

    An evaluation scan with the same pixels as a training scan moves to the training scans.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    eval_numbers: set[int] = set()
    for digit in range(10):
        numbers = [scan.number for scan in scans if scan.digit == digit]
        eval_numbers.update(rng.permutation(numbers)[:EVAL_SCANS_PER_DIGIT].tolist())
    train_scans = [scan for scan in scans if scan.number not in eval_numbers]
    train_pixels = {scan.pixels.tobytes() for scan in train_scans}
    eval_scans = [scan for scan in scans if scan.number in eval_numbers]
    train_scans += [scan for scan in eval_scans if scan.pixels.tobytes() in train_pixels]
    return train_scans, [scan for scan in eval_scans if scan.pixels.tobytes() not in train_pixels]


# --- Dialogues


def write_dataset(folder: Path) -> None:
    """Write the images, train.jsonl and eval.jsonl."""
    scans = load_scans()
    train_scans, eval_scans = split_scans(scans)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for scan in scans:
        scan.picture().save(folder / scan.file_name, optimize=True)
    _write_lines(dialogue_rows(train_scans, TRAIN_ROWS, SEED), folder / "train.jsonl")
    _write_lines(dialogue_rows(eval_scans, EVAL_ROWS, SEED + 1), folder / "eval.jsonl")


def dialogue_rows(scans: list[Scan], counts: tuple[int, ...], seed: int) -> list[dict]:
    """Return the rows of one split in random order; all scans of a digit are used before one is repeated."""
    rng = Random(seed)
    scans_of_digit = [endless(rng, [scan for scan in scans if scan.digit == digit]) for digit in range(10)]
    rows = [
        _row(dialogue, scans_of_digit)
        for kind, count in zip(KINDS, counts, strict=True)
        for dialogue in kind.balanced(rng, count)
    ]
    rng.shuffle(rows)
    return rows


def _row(dialogue: Dialogue, scans_of_digit: list[Iterator[Scan]]) -> dict:
    """Return the dialogue as one row, whose pictures are the next scans of its digits, all different."""
    messages = []
    for turn in dialogue.turns:
        messages.append({"role": "user", "content": [_content_block(part) for part in turn.question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    images: list[str] = []
    for picture in dialogue.pictures:
        images.append(next(s.file_name for s in scans_of_digit[picture.digit] if s.file_name not in images))
    return {"task": dialogue.task, "messages": messages, "images": images}


def _content_block(part: Part) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}


def _write_lines(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- Preferences


def write_preferences(folder: Path) -> None:
    """Write the preferences beside the dialogues that they repeat."""
    for number, (source, (target, count)) in enumerate(PREFERENCES.items()):
        rng = Random(SEED + number)
        lines = (folder / source).read_text(encoding="utf-8").splitlines()[:count]
        _write_lines([_preference_row(json.loads(line), rng) for line in lines], folder / target)


def _preference_row(row: dict, rng: Random) -> dict:
    """Return the last question of a dialogue, the turns before it, and a right and a wrong answer."""
    *before, answer = row["messages"]
    prompt = [{"role": message["role"], "content": _plain_text(message)} for message in before]
    chosen = _plain_text(answer)
    question = prompt[0]["content"] if len(prompt) == 1 else prompt
    answers = {"chosen": chosen, "rejected": _wrong_answer(rng, chosen)}
    return {"task": row["task"], "prompt": question, **answers, "images": row["images"]}


def _plain_text(message: dict) -> str:
    """Return a message as plain text, with `<image>` for an image."""
    return "".join("<image>" if block["type"] == "image" else block["text"] for block in message["content"])


def _wrong_answer(rng: Random, right: str) -> str:
    """Return another answer of the same kind; of two digits, one is changed."""
    for pair in (("Yes.", "No."), ("Even.", "Odd.")):
        if right in pair:
            return pair[1 - pair.index(right)]
    digits = right.rstrip(".").lower().split(" and ")
    changed = rng.randrange(len(digits))
    digits[changed] = rng.choice([word for word in DIGIT_WORDS if word != digits[changed]])
    return sentence(" and ".join(digits))


if __name__ == "__main__":
    write_dataset(Path(sys.argv[1]))
    write_preferences(Path(sys.argv[1]))
