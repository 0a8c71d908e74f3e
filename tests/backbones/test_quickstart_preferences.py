"""The quickstart's pairs of answers: a right one and a wrong one, about the scans of their own split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flamingo_ft.backbones.nano_build.quickstart_preferences import ROWS, write_preferences

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
CHOICES = ({"Yes.", "No."}, {"Even.", "Odd."})


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def test_the_files_are_those_the_script_writes(tmp_path):
    for source in ROWS:
        shutil.copy(QUICKSTART / source, tmp_path)
    write_preferences(tmp_path)
    for name, _ in ROWS.values():
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


@pytest.mark.parametrize("source", ROWS)
def test_the_preferred_answer_is_the_one_of_the_dialogue_and_the_other_is_of_its_kind(source):
    name, count = ROWS[source]
    pairs = rows_of(name)
    assert len(pairs) == count
    for row, pair in zip(rows_of(source), pairs, strict=False):
        assert (pair["images"], pair["chosen"]) == (row["images"], row["messages"][-1]["content"][0]["text"])
        answers = {pair["chosen"], pair["rejected"]}
        assert len(answers) == 2
        assert answers in CHOICES or len(pair["chosen"].split()) == len(pair["rejected"].split())


def test_no_scan_of_held_out_pairs_is_trained_on():
    shown = [{image for pair in rows_of(name) for image in pair["images"]} for name, _ in ROWS.values()]
    assert not shown[0] & shown[1]
