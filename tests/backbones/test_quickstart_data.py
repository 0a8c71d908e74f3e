"""The quickstart data: right answers, balanced tasks, disjoint splits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from flamingo_ft.backbones.build_nano.digit_questions import KINDS
from flamingo_ft.backbones.build_nano.quickstart_data import (
    PREFERENCES,
    load_scans,
    write_dataset,
    write_preferences,
)
from flamingo_ft.backbones.build_nano.text_data import FILES as TEXT_FILES
from flamingo_ft.backbones.build_nano.text_data import write_text_rows

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def read_rows(split: str, folder: Path = QUICKSTART) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


ROWS = {split: read_rows(split) for split in ("train", "eval")}


def right_answer(question: str, digits: list[int]) -> str:
    """Return the answer that the question's wording and the labels of the pictures so far imply."""
    last = digits[-1]
    if "five" in question or "more than" in question:
        return "Yes." if last > 5 else "No."
    if "odd" in question:
        return "Odd." if last % 2 else "Even."
    if "same" in question:
        return "Yes." if digits[-2] == last else "No."
    if "both" in question or "digits" in question:
        return f"{WORDS[digits[-2]]} and {WORDS[last]}.".capitalize()
    return f"{WORDS[last]}.".capitalize()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_is_right_for_the_labels_of_its_pictures(split):
    digit_by_image = {scan.file_name: scan.digit for scan in load_scans()}
    for row in ROWS[split]:
        remaining, digits = list(row["images"]), []
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            digits += [
                digit_by_image[remaining.pop(0)] for block in question["content"] if block["type"] == "image"
            ]
            text = " ".join(block["text"] for block in question["content"] if block["type"] == "text")
            assert answer["content"] == [{"type": "text", "text": right_answer(text, digits)}], row
        assert not remaining


def test_every_picture_exists_and_opens():
    for name in {name for rows in ROWS.values() for row in rows for name in row["images"]}:
        with Image.open(QUICKSTART / name) as image:
            assert (image.size, image.mode) == ((32, 32), "L")


def test_the_pictures_of_a_row_are_all_different():
    assert all(len(set(row["images"])) == len(row["images"]) for rows in ROWS.values() for row in rows)


def test_every_scan_is_in_one_split_and_every_evaluation_scan_is_used():
    names = {split: {name for row in rows for name in row["images"]} for split, rows in ROWS.items()}
    assert not names["train"] & names["eval"]
    assert len(names["eval"]) == 360
    assert names["train"] | names["eval"] == {scan.file_name for scan in load_scans()}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_of_one_task_are_equally_frequent(split):
    answers: dict[str, Counter] = {}
    for row in ROWS[split]:
        answers.setdefault(row["task"], Counter())[row["messages"][-1]["content"][0]["text"]] += 1
    for task in ("which_digit", "even_or_odd", "larger_than_five", "name_both", "same_digit"):
        assert len(set(answers[task].values())) == 1, (task, answers[task])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.make.__name__)
def test_the_best_guess_without_pictures_has_the_stated_accuracy(kind):
    answers: dict[tuple, Counter] = {}
    for dialogue in kind.balanced(Random(0), 1800):
        *before, last = (turn.answer for turn in dialogue.turns)
        answers.setdefault(tuple(before), Counter())[last] += 1
    assert sum(max(counts.values()) for counts in answers.values()) == pytest.approx(1800 * kind.chance)


def test_the_script_reproduces_the_packaged_files(tmp_path):
    write_dataset(tmp_path)
    assert read_rows("train", tmp_path) == ROWS["train"]
    assert read_rows("eval", tmp_path) == ROWS["eval"]
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as written, Image.open(QUICKSTART / "images" / path.name) as packaged:
            assert written.tobytes() == packaged.tobytes()


CHOICES = ({"Yes.", "No."}, {"Even.", "Odd."})


def test_the_script_reproduces_the_packaged_preferences(tmp_path):
    for source in PREFERENCES:
        shutil.copy(QUICKSTART / source, tmp_path)
    write_preferences(tmp_path)
    for name, _ in PREFERENCES.values():
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


@pytest.mark.parametrize("source", PREFERENCES)
def test_the_chosen_answer_is_the_dialogues_and_the_rejected_one_is_of_the_same_kind(source):
    name, count = PREFERENCES[source]
    pairs = read_rows(name.removesuffix(".jsonl"))
    assert len(pairs) == count
    for row, pair in zip(read_rows(source.removesuffix(".jsonl")), pairs, strict=False):
        assert (pair["images"], pair["chosen"]) == (row["images"], row["messages"][-1]["content"][0]["text"])
        answers = {pair["chosen"], pair["rejected"]}
        assert len(answers) == 2
        assert answers in CHOICES or len(pair["chosen"].split()) == len(pair["rejected"].split())


def test_the_two_preference_files_share_no_image():
    images = [
        {image for pair in read_rows(name.removesuffix(".jsonl")) for image in pair["images"]}
        for name, _ in PREFERENCES.values()
    ]
    assert not images[0] & images[1]


# --- rows of text alone


def test_the_script_reproduces_the_packaged_text_rows_and_no_row_is_in_both_files(tmp_path):
    write_text_rows(tmp_path)
    rows = []
    for name, count in TEXT_FILES.items():
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()
        rows += (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
        assert len(rows) == len({*rows}) and len(rows) >= count
    assert not any("images" in json.loads(row) for row in rows)


def test_a_sentence_that_is_to_be_repeated_is_the_answer():
    turns = [row["messages"] for row in read_rows("text") if row["task"] == "plain_text"]
    repeated = [turn for turn in turns if turn[0]["content"].startswith(("Repeat: ", "Say this again: "))]
    assert len(repeated) > 100
    for question, answer in repeated:
        assert question["content"].partition(": ")[2] == answer["content"]
