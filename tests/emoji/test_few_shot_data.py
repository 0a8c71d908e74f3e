"""The few-shot data: only the images before a question tell which word is right, and no word is known."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from flamingo_ft.config.library import packaged_recipes

from .test_data import FOLDER as EMOJI

FOLDER = packaged_recipes()["few_shot"].parent / "few_shot"
FILES = ("train.jsonl", "eval.jsonl", "names/train.jsonl", "names/val.jsonl")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def pairs(episode: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the images of an episode, each with its word."""
    words = [text.removeprefix("Output:") for text in episode["texts"] if text]
    return list(zip(filter(None, episode["images"]), words, strict=True))


def words(name: str) -> set[str]:
    return {word for row in rows(name) for _, word in pairs(row)}


@pytest.fixture(scope="module")
def group_of() -> dict[str, str]:
    """The group of every drawing."""
    samples = [
        json.loads(line)
        for split in ("train", "eval")
        for line in (EMOJI / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    asked = [sample for sample in samples if sample["task"] == "group"]
    return {s["images"][0].removeprefix("images/"): s["messages"][1]["content"][0]["text"] for s in asked}


def test_words_and_drawings_of_the_questions_are_in_no_training_episode():
    labels = {row["label"] for name in FILES[2:] for row in rows(name)}
    assert len(labels) == 5 and not words("train.jsonl") & (words("eval.jsonl") | labels)
    asked = [image for row in rows("eval.jsonl") for image, _ in pairs(row)]
    asked += [row["image"] for row in rows("names/val.jsonl")]
    assert {Path(image).parent.name for image in asked} == {"fluent"}
    shown = [image for row in rows("train.jsonl") for image, _ in pairs(row)]
    assert {Path(image).parent.name for image in shown} == {"noto", "twemoji"}


def test_the_images_before_a_question_decide_its_word(group_of):
    for row in rows("eval.jsonl"):
        *shown, (image, word) = pairs(row)
        word_of = {group_of[drawing]: name for drawing, name in shown}
        assert len(shown) == 4 and word_of[group_of[image]] == word
        assert image not in dict(shown)


def test_a_word_is_that_of_one_group_and_every_drawing_has_one(group_of):
    for name in FILES[2:]:
        pairs = {(group_of[row["image"].partition("images/")[2]], row["label"]) for row in rows(name)}
        assert len(pairs) == 5
    named = [(FOLDER / "names" / row["image"]).resolve() for name in FILES[2:] for row in rows(name)]
    assert sorted(named) == sorted(path.resolve() for path in EMOJI.glob("images/*/*.webp"))


def test_the_files_are_what_the_script_writes(tmp_path):
    runpy.run_path(str(FOLDER / "make_episodes.py"))["main"](EMOJI, tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
