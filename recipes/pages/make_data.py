"""Draw the pages of this folder: `python recipes/pages/make_data.py`.

A page has two lines of one number each, four printed digits at slightly different places. The questions ask
for the number of a line, and the answer reads it digit by digit. No number is in both files, so that an
answer can come from the image alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from flamingo_ft.backbones.build_nano.digit_questions import DIGIT_WORDS

FOLDER = Path(__file__).parent
PAGES = {"train": 1200, "eval": 200}
LINES, DIGITS = 2, 4
CELL = 32  # pixels, of a digit
FONT_PIXELS = 28
JITTER = 2.0  # pixels
LINE_WORDS = ("one", "two")


def draw_page(rng: Random, numbers: list[str]) -> bytes:
    """Return a page with a number on each line as a PNG, white on black."""
    page = Image.new("L", (DIGITS * CELL, LINES * CELL), 0)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_PIXELS)
    for line, number in enumerate(numbers):
        for place, digit in enumerate(number):
            x, y = ((index + 0.5) * CELL + rng.uniform(-JITTER, JITTER) for index in (place, line))
            draw.text((x, y), digit, font=font, fill=255, anchor="mm")
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def new_numbers(rng: Random, used: set[str]) -> list[str]:
    """Return the numbers of a page, none of which is ``used``, and add them to it."""
    numbers: list[str] = []
    while len(numbers) < LINES:
        number = "".join(rng.choices("0123456789", k=DIGITS))
        if number not in used:
            used.add(number)
            numbers.append(number)
    return numbers


def rows(rng: Random, pages: int, used: set[str]) -> Iterator[dict[str, object]]:
    """Yield a question about each line of each page."""
    for _ in range(pages):
        numbers = new_numbers(rng, used)
        image = {"bytes": draw_page(rng, numbers), "path": None}
        for line, number in zip(LINE_WORDS, numbers, strict=True):
            answer = " ".join(DIGIT_WORDS[int(digit)] for digit in number)
            yield {"image": image, "question": f"Read line {line}.", "answer": answer, "task": "read_line"}


def main() -> None:
    rng, used = Random(0), set()
    for split, pages in PAGES.items():
        table = pa.Table.from_pylist(list(rows(rng, pages, used)))
        pq.write_table(table, FOLDER / f"{split}.parquet", compression="zstd")


if __name__ == "__main__":
    main()
