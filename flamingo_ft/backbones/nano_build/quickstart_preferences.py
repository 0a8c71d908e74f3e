"""Write the quickstart's pairs of answers: `python -m flamingo_ft.backbones.nano_build.quickstart_preferences FOLDER`.

FOLDER/preferences.jsonl and FOLDER/preferences_eval.jsonl ask what FOLDER/train.jsonl and FOLDER/eval.jsonl ask last in
their first rows; the right answer is to be preferred to a wrong one of the same kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from flamingo_ft.backbones.nano_build.language_of_digits import DIGIT_WORDS, sentence

SEED = 0
ROWS = {"train.jsonl": ("preferences.jsonl", 800), "eval.jsonl": ("preferences_eval.jsonl", 300)}
EITHER_OR = (("Yes.", "No."), ("Even.", "Odd."))


def wrong_answer(rng: Random, right: str) -> str:
    """Another answer of the same kind; of two digits, one is another."""
    for pair in EITHER_OR:
        if right in pair:
            return pair[1 - pair.index(right)]
    digits = right.rstrip(".").lower().split(" and ")
    changed = rng.randrange(len(digits))
    digits[changed] = rng.choice([word for word in DIGIT_WORDS if word != digits[changed]])
    return sentence(" and ".join(digits))


def message_text(message: dict) -> str:
    """A message as plain text, `<image>` where one stands."""
    return "".join("<image>" if block["type"] == "image" else block["text"] for block in message["content"])


def pair_of(row: dict, rng: Random) -> dict:
    """The last question of a row of the quickstart, what was said before it, and both answers."""
    *before, right = row["messages"]
    prompt = [{"role": message["role"], "content": message_text(message)} for message in before]
    chosen = message_text(right)
    question = prompt[0]["content"] if len(prompt) == 1 else prompt
    answers = {"chosen": chosen, "rejected": wrong_answer(rng, chosen)}
    return {"task": row["task"], "prompt": question, **answers, "images": row["images"]}


def write_preferences(folder: Path) -> None:
    for number, (source, (target, count)) in enumerate(ROWS.items()):
        rng = Random(SEED + number)
        lines = (folder / source).read_text(encoding="utf-8").splitlines()[:count]
        pairs = [pair_of(json.loads(line), rng) for line in lines]
        (folder / target).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    write_preferences(Path(sys.argv[1]))
