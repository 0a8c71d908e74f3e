"""Scans of digits on larger canvases, with questions whose answers are boxes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

SCANS = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
QUESTION = "Where is the digit?"


SIDE, SCAN = 96, 48  # pixels of a canvas and of a scan on it
STEP = 24  # between two places


def write_canvases(folder: Path, name: str, count: int, seed: int) -> Path:
    """Write ``count`` canvases with one scan each, and the rows of a file that ask where it is."""
    random, scans, rows = Random(seed), sorted(SCANS.glob("*.png")), []
    for number in range(count):
        left, top = (random.randrange(0, SIDE - SCAN + 1, STEP) for _ in range(2))
        canvas = Image.new("RGB", (SIDE, SIDE))
        canvas.paste(Image.open(random.choice(scans)).resize((SCAN, SCAN)), (left, top))
        canvas.save(folder / f"{name}{number}.png")
        box = [left, top, left + SCAN, top + SCAN]
        rows.append({"image": f"{name}{number}.png", "question": QUESTION, "answer": "<box>", "boxes": [box]})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
