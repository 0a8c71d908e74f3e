"""Small data sets in common forms, made from the packaged ones: examples of a user's own."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from random import Random

from PIL import Image

from flamingo_ft import atomic
from flamingo_ft.config.library import library_folder
from flamingo_ft.data import Sample, read_samples
from flamingo_ft.data.sample import display_text

IMAGES, TABLE, DIALOGUES = "images", "questions.csv", "dialogues.json"
PAGE, SCAN, STEP = 96, 48, 12  # pixels: side of a page, of a digit on it, and between two places


def write_example_data(folder: Path, rows: int = 200) -> Path:
    """Write a small data set in two common forms, as an example of your own, and return ``folder``.

    ``images`` holds drawings of the packaged emoji data. ``questions.csv``, with the columns image, question
    and answer, and ``dialogues.json``, in LLaVA's form, are about ``rows`` of them each.
    """
    samples = read_samples(library_folder() / "emoji" / "train.jsonl")
    named = [sample for sample in samples if sample.task == "name"][: 2 * rows]
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    table = [_example_row(sample, folder / IMAGES) for sample in named]
    table, dialogues = table[:rows], table[rows:]
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer"])
        writer.writeheader()
        writer.writerows(table)
    atomic.write_text(folder / DIALOGUES, json.dumps([_llava_row(row) for row in dialogues], indent=1))
    return folder


def _example_row(sample: Sample, images: Path) -> dict[str, str]:
    """Copy the image of a sample, and return its row of the table."""
    (image,) = sample.images
    source = Path(str(image))
    name = f"{source.parent.name}_{source.name}"
    shutil.copyfile(source, images / name)
    return {"image": name, "question": "What is this?", "answer": display_text(sample.messages[-1])}


def _llava_row(row: dict[str, str]) -> dict[str, object]:
    turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
    return {"image": row["image"], "conversations": [{"from": who, "value": text} for who, text in turns]}


def write_box_data(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write pages with a handwritten digit somewhere, and return the file of rows that ask where it is.

    The answers are boxes, in pixels. seed: of the choice of digits and places.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random, scans = Random(seed), sorted((library_folder() / "quickstart" / "images").glob("*.png"))
    lines = []
    for number in range(rows):
        left, top = (random.randrange(0, PAGE - SCAN + 1, STEP) for _ in range(2))
        page = Image.new("RGB", (PAGE, PAGE))
        page.paste(Image.open(random.choice(scans)).resize((SCAN, SCAN)), (left, top))
        page.save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "question": "Where is the digit?", "answer": "<box>"}
        lines.append(json.dumps(row | {"boxes": [[left, top, left + SCAN, top + SCAN]]}) + "\n")
    atomic.write_text(folder / "rows.jsonl", "".join(lines))
    return folder / "rows.jsonl"
