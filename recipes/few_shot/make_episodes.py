"""Write the few-shot data from the emoji data: `python make_episodes.py recipes/emoji recipes/few_shot`.

train.jsonl and eval.jsonl have a document in each line, an *episode*: several images, each followed by a
made-up word. The same word stands for things of the same kind, and a word means something else in every
episode. So only the images before it tell which word an image gets.

names/train.jsonl and names/val.jsonl give each of five groups one more made-up word: the demonstrations and
the questions of `flamingo-ft eval MODEL classification --data names`.

Training shows two vendors' drawings. eval.jsonl and names/val.jsonl show a third's, and their words stand in
no training episode.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

SEED = 0
TRAIN_EPISODES = 4000
EVAL_EPISODES = 200
CHUNKS = 8  # images in a training episode
SHOTS = 4  # images before the question of an evaluation episode
CLASSES = (2, 5)  # kinds in an episode, from and to
IDENTITY_SHARE = 0.25  # of training episodes: an emoji is a kind of its own
EVAL_WORDS = 40

Drawings = dict[str, list[str]]  # images by what they show


def made_up_words() -> list[str]:
    """Return words of two syllables."""
    syllables = [c + v for c, v in product("bdfgklmnprstvz", "aeiou")]
    return [first + second + end for first, second, end in product(syllables, syllables, "fgkpz")]


def read_drawings(rows: Path, task: str) -> Drawings:
    """Return images of emoji/images by the answer to one of the emoji data's questions, such as the group."""
    drawings: Drawings = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] == task:
            answer = row["messages"][-1]["content"][0]["text"]
            drawings.setdefault(answer, []).extend(image.removeprefix("images/") for image in row["images"])
    return {answer: sorted(images) for answer, images in sorted(drawings.items())}


def training_episodes(
    groups: Drawings, names: Drawings, words: Sequence[str], random: Random
) -> Iterator[dict]:
    for _ in range(TRAIN_EPISODES):
        drawings = names if random.random() < IDENTITY_SHARE else groups
        word_of = words_of_kinds(drawings, words, random)
        kinds = random.choices([*word_of], k=CHUNKS)
        yield episode([(random.choice(drawings[kind]), word_of[kind]) for kind in kinds])


def eval_episodes(groups: Drawings, words: Sequence[str], random: Random) -> Iterator[dict]:
    """Yield episodes whose last image is another one of a kind that was shown before."""
    for _ in range(EVAL_EPISODES):
        word_of = words_of_kinds(groups, words, random)
        kinds = random.choices([*word_of], k=SHOTS)
        kinds.append(random.choice(kinds))
        unseen = {kind: random.sample(groups[kind], len(kinds)) for kind in word_of}
        yield episode([(unseen[kind].pop(), word_of[kind]) for kind in kinds])


def words_of_kinds(drawings: Drawings, words: Sequence[str], random: Random) -> dict[str, str]:
    """Return a few kinds, each with a word."""
    kinds = random.sample([*drawings], random.randint(*CLASSES))
    return dict(zip(kinds, random.sample(words, len(kinds)), strict=True))


def episode(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return images and their words as a document, in the form of OpenFlamingo's few-shot prompts."""
    return {
        "images": [value for image, _ in pairs for value in (image, None)],
        "texts": [value for _, word in pairs for value in (None, f"Output:{word}")],
    }


def labelled(drawings: Drawings, word_of: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"image": f"../../emoji/images/{image}", "label": word_of[kind]}
        for kind, images in drawings.items()
        for image in images
    ]


def write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(emoji: Path, folder: Path) -> None:
    random = Random(SEED)
    words = made_up_words()
    random.shuffle(words)
    held_out, training = words[:EVAL_WORDS], words[EVAL_WORDS:]
    groups, names = (read_drawings(emoji / "train.jsonl", task) for task in ("group", "name"))
    asked = read_drawings(emoji / "eval.jsonl", "group")
    write(folder / "train.jsonl", training_episodes(groups, names, training, random))
    write(folder / "eval.jsonl", eval_episodes(asked, held_out, random))
    word_of = dict(zip(groups, random.sample(held_out, len(groups)), strict=True))
    write(folder / "names" / "train.jsonl", labelled(groups, word_of))
    write(folder / "names" / "val.jsonl", labelled(asked, word_of))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
