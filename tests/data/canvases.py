"""Scans of digits on larger canvases, with questions whose answers are boxes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

SCANS = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
QUESTION = "Where is the digit?"


def write_canvases(folder: Path, name: str, count: int, seed: int, size: tuple[int, int] = (96, 96)) -> Path:
    """Write ``count`` canvases of ``size`` with one scan each, and return the rows: where is it?"""
    random, scans, rows = Random(seed), sorted(SCANS.glob("*.png")), []
    for number in range(count):
        side = random.randint(min(size) // 3, min(size) // 2)
        left, top = random.randint(0, size[0] - side), random.randint(0, size[1] - side)
        canvas = Image.new("RGB", size)
        canvas.paste(Image.open(random.choice(scans)).resize((side, side)), (left, top))
        canvas.save(folder / f"{name}{number}.png")
        box = [left, top, left + side, top + side]
        rows.append({"image": f"{name}{number}.png", "question": QUESTION, "answer": "<box>", "boxes": [box]})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
