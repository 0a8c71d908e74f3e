"""Write the quickstart dataset: `python -m flamingo_ft.backbones.nano_build.quickstart_data FOLDER`.

FOLDER/images/*.png, FOLDER/train.jsonl and FOLDER/eval.jsonl look like anyone's own instruction set.
Held-out scans occur in eval.jsonl alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from flamingo_ft.backbones.nano_build.digits import Scan, load_scans, split_scans
from flamingo_ft.backbones.nano_build.language_of_digits import KINDS, Dialogue, Part, Picture, endless

SEED = 0
# Rows for each of KINDS, in their order; every count is a multiple of what balances the answers exactly.
TRAIN_ROWS = (900, 600, 600, 1400, 1600, 400, 400, 500, 800)
EVAL_ROWS = (200, 200, 240, 200, 200, 50, 48, 50, 52)


def block_of(part: Part) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}


def row_of(dialogue: Dialogue, pools: list[Iterator[Scan]]) -> dict:
    """The dialogue as one line of the dataset, with the next scans of its digits at the pictures."""
    messages = []
    for turn in dialogue.turns:
        messages.append({"role": "user", "content": [block_of(part) for part in turn.question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    images: list[str] = []
    for picture in dialogue.pictures:
        images.append(next(s.file_name for s in pools[picture.digit] if s.file_name not in images))
    return {"task": dialogue.task, "messages": messages, "images": images}


def rows_of(scans: list[Scan], counts: tuple[int, ...], seed: int) -> list[dict]:
    """The rows of one split in random order; every scan of a digit is used before one is used again."""
    rng = Random(seed)
    pools = [endless(rng, [scan for scan in scans if scan.digit == digit]) for digit in range(10)]
    rows = [
        row_of(dialogue, pools)
        for kind, count in zip(KINDS, counts, strict=True)
        for dialogue in kind.balanced(rng, count)
    ]
    rng.shuffle(rows)
    return rows


def write_lines(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_dataset(folder: Path) -> None:
    scans = load_scans()
    train, held_out = split_scans(scans)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for scan in scans:
        scan.picture().save(folder / scan.file_name, optimize=True)
    write_lines(rows_of(train, TRAIN_ROWS, SEED), folder / "train.jsonl")
    write_lines(rows_of(held_out, EVAL_ROWS, SEED + 1), folder / "eval.jsonl")


if __name__ == "__main__":
    write_dataset(Path(sys.argv[1]))
