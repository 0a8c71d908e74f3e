"""Write the emoji data: `python make_data.py GOOGLE TWITTER FLUENT FOLDER`.

GOOGLE, TWITTER and FLUENT are the unpacked npm packages emoji-datasource-google 16.0.0 (Noto, Apache-2.0),
emoji-datasource-twitter 16.0.0 (Twemoji, CC BY 4.0) and @lobehub/fluent-emoji-3d 1.1.0 (Fluent, MIT).
FOLDER/images/*/*.webp are drawings of the same emoji by three vendors. FOLDER/train.jsonl asks about the
first two vendors' drawings, FOLDER/eval.jsonl about the third's, which training never sees.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

SEED = 0
SIDE = 64
NAMES_PER_GROUP = 60  # at most
GROUPS = {
    "animal": (
        "animal-amphibian",
        "animal-bird",
        "animal-bug",
        "animal-mammal",
        "animal-marine",
        "animal-reptile",
    ),
    "food": ("drink", "food-asian", "food-fruit", "food-prepared", "food-sweet", "food-vegetable"),
    "vehicle": ("transport-air", "transport-ground", "transport-water"),
    "clothing": ("clothing",),
    "place": ("place-building", "place-geographic", "place-other", "place-religious"),
}
GROUP_OF = {subcategory: group for group, subcategories in GROUPS.items() for subcategory in subcategories}
# In a subcategory of vehicles or places, but neither.
MISPLACED = {
    "anchor",
    "barber pole",
    "brick",
    "bus stop",
    "construction sign",
    "fuel pump",
    "horizontal traffic light",
    "motorway",
    "octagonal sign",
    "oil drum",
    "parachute",
    "police cars revolving light",
    "railway track",
    "ring buoy",
    "rock",
    "satellite",
    "seat",
    "station",
    "vertical traffic light",
    "wheel",
    "wood",
}
TRAIN_STYLES = ("noto", "twemoji")
EVAL_STYLE = "fluent"
EVAL_PAIRS = 200

QUESTIONS = {
    "group": (
        "Which kind is this: animal, food, vehicle, clothing or place?",
        "Animal, food, vehicle, clothing or place: what kind of thing is it?",
    ),
    "name": ("What is this?", "Name what you see."),
    "pair": ("Are these two of the same kind?", "Do both belong to the same kind?"),
}


@dataclass(frozen=True)
class Emoji:
    """An emoji: its Unicode name in lower case, its group, its code points, and its drawing by style."""

    name: str
    group: str
    code: str
    sources: dict[str, Path]

    def image(self, style: str) -> str:
        """Return the path of a drawing relative to the data's folder."""
        return f"images/{style}/{self.code}.webp"


def read_emojis(google: Path, twitter: Path, fluent: Path) -> Iterator[Emoji]:
    """Yield the emoji of `GROUPS` that all three vendors drew, in Unicode's order."""
    entries = json.loads((google / "emoji.json").read_text(encoding="utf-8"))
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        code = entry["image"].removesuffix(".png")
        spellings = (code, code.replace("-fe0f", ""), f"{code}-fe0f")
        drawn = [path for name in spellings if (path := fluent / "assets" / f"{name}.webp").exists()]
        sources = {
            "noto": google / "img/google/64" / f"{code}.png",
            "twemoji": twitter / "img/twitter/64" / f"{code}.png",
        }
        complete = drawn and all(path.exists() for path in sources.values())
        name, group = entry["name"].lower(), GROUP_OF.get(entry["subcategory"])
        if complete and group and name not in MISPLACED:
            yield Emoji(name, group, code, sources | {"fluent": drawn[0]})


def choose(emojis: list[Emoji], random: Random) -> list[Emoji]:
    """Return up to `NAMES_PER_GROUP` emoji of each group, those with short plain names first."""
    chosen = []
    for group in GROUPS:
        members = [emoji for emoji in emojis if emoji.group == group]
        random.shuffle(members)
        chosen += sorted(members, key=lambda emoji: not _is_plain(emoji.name))[:NAMES_PER_GROUP]
    return chosen


def _is_plain(name: str) -> bool:
    words = name.replace("-", " ").split()
    return len(name.split()) <= 2 and all(word.isalpha() for word in words)


def write_images(emojis: list[Emoji], folder: Path) -> None:
    """Write every drawing on white, 64 x 64 pixels."""
    for emoji in emojis:
        for style, source in emoji.sources.items():
            drawing = Image.open(source).convert("RGBA")
            picture = Image.new("RGBA", drawing.size, "white")
            picture.alpha_composite(drawing)
            target = folder / emoji.image(style)
            target.parent.mkdir(parents=True, exist_ok=True)
            resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            resized.save(target, quality=90, method=6)


def rows(emojis: list[Emoji], styles: tuple[str, ...], random: Random) -> Iterator[dict[str, Any]]:
    """Yield three rows about each drawing: its group, its name, and whether another one is of its group."""
    for style in styles:
        for index, emoji in enumerate(emojis):
            image = emoji.image(style)
            yield row("group", [image], emoji.group, random)
            yield row("name", [image], emoji.name, random)
            same = index % 2 == 0
            others = [o for o in emojis if o is not emoji and (o.group == emoji.group) == same]
            second = random.choice(others).image(random.choice(styles))
            yield row("pair", [image, second], "yes" if same else "no", random)


def row(task: str, images: list[str], answer: str, random: Random) -> dict[str, Any]:
    image, question = {"type": "image"}, text(random.choice(QUESTIONS[task]))
    content = [image, question]
    if len(images) == 2:
        content = [text("First: "), image, text(" Second: "), image, text(" "), question]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [text(answer)]}]
    return {"task": task, "messages": messages, "images": images}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def write_rows(path: Path, samples: list[dict[str, Any]], random: Random) -> None:
    random.shuffle(samples)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(google: Path, twitter: Path, fluent: Path, folder: Path) -> None:
    random = Random(SEED)
    emojis = choose([*read_emojis(google, twitter, fluent)], random)
    write_images(emojis, folder)
    write_rows(folder / "train.jsonl", [*rows(emojis, TRAIN_STYLES, random)], random)
    held_out = [*rows(emojis, (EVAL_STYLE,), random)]
    pairs = [sample for sample in held_out if sample["task"] == "pair"]
    write_rows(
        folder / "eval.jsonl",
        [sample for sample in held_out if sample["task"] != "pair"] + pairs[:EVAL_PAIRS],
        random,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
