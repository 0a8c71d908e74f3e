"""The emoji data: training and evaluation share no drawing, and frequency gives no answer away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flamingo_ft.config.library import packaged_recipes

FOLDER = packaged_recipes()["emoji"].parent / "emoji"
MAX_BYTES = 4 * 2**20  # what the data may add to a wheel


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(split: str, task: str) -> list[str]:
    return [row["messages"][-1]["content"][0]["text"] for row in rows(split) if row["task"] == task]


def test_held_out_drawings_are_of_the_same_emoji_in_a_style_that_training_never_shows():
    train, held_out = (
        {image for row in rows(split) for image in row["images"]} for split in ("train", "eval")
    )
    assert {Path(image).parent.name for image in train} == {"noto", "twemoji"}
    assert {Path(image).parent.name for image in held_out} == {"fluent"}
    assert {Path(image).name for image in train} == {Path(image).name for image in held_out}
    files = {str(path.relative_to(FOLDER).as_posix()) for path in FOLDER.glob("images/*/*.webp")}
    assert files == train | held_out


@pytest.mark.parametrize("split", ["train", "eval"])
def test_guessing_the_most_frequent_answer_gains_little(split):
    names = Counter(answers(split, "name"))
    assert len(names) == 277 and len(set(names.values())) == 1
    groups = Counter(answers(split, "group"))
    assert len(groups) == 5 and max(groups.values()) / groups.total() < 0.22
    assert Counter(answers(split, "pair"))["yes"] / len(answers(split, "pair")) == pytest.approx(
        0.5, abs=0.01
    )


def test_the_data_is_small_and_its_licences_are_beside_it():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    licences = (FOLDER / "LICENSE.md").read_text(encoding="utf-8")
    assert all(f"| `{style}` |" in licences for style in ("noto", "twemoji", "fluent"))
