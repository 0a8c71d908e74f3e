"""Write text-only rows of the quickstart data: `python -m flamingo_ft.backbones.build_nano.text_data FOLDER`.

FOLDER/text.jsonl and FOLDER/text_eval.jsonl are conversations of the kinds that the nano language model was
trained on: questions about digits in words, and plain ones. Their answers follow from the questions. No row
is in both files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from flamingo_ft.backbones.build_nano.corpus import Message, picture_dialogue, plain_dialogue

SEED = 100  # not the corpus's own
FILES = {"text.jsonl": 1500, "text_eval.jsonl": 240}
IN_WORDS, PLAIN = "digits_in_words", "plain_text"
PLAIN_FRACTION = 0.5
OPEN_QUESTIONS = ("Tell me a fact.", "Say something true.")  # any of many answers is right


def text_rows(rng: Random) -> Iterator[dict]:
    """Yield different rows without end."""
    seen: set[str] = set()
    while True:
        plain = rng.random() < PLAIN_FRACTION
        messages: list[Message] = plain_dialogue(rng) if plain else picture_dialogue(rng, captioned=True)
        row = {"task": PLAIN if plain else IN_WORDS, "messages": messages}
        key = json.dumps(messages)
        if key in seen or messages[0]["content"] in OPEN_QUESTIONS:
            continue
        seen.add(key)
        yield row


def write_text_rows(folder: Path) -> None:
    """Write both files."""
    rows = text_rows(Random(SEED))
    for name, count in FILES.items():
        lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_text_rows(Path(sys.argv[1]))
