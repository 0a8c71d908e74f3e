"""Labelled answers: both labels are looked for in all rows, and in the beginning of a stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo_ft.config import DataSection
from flamingo_ft.data import open_data, unpaired
from flamingo_ft.data.unpaired import check_both_labels
from flamingo_ft.errors import UserError

GOOD = 40


def sources(folder: Path, labels: list[bool], **options):
    rows = [{"prompt": "Which?", "completion": "Seven.", "label": label} for label in labels]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(folder / "rows.jsonl"), **options}
    return open_data(DataSection.model_validate({"train": [source]}), 0).train


@pytest.fixture(autouse=True)
def few_rows_are_read_first(monkeypatch):
    monkeypatch.setattr(unpaired, "MAX_LABELS_READ", GOOD)
    monkeypatch.setattr(unpaired, "SPREAD_ROWS", 4)


@pytest.mark.parametrize("place", [GOOD, GOOD // 2 + 1])
def test_a_single_bad_answer_anywhere_in_a_file_is_enough(tmp_path, place):
    labels = [True] * GOOD
    labels.insert(place, False)
    check_both_labels(sources(tmp_path, labels))


def test_a_file_sorted_by_label_is_read_in_a_few_rows(tmp_path):
    (weighted,) = sources(tmp_path, [True] * GOOD + [False] * GOOD)
    read, parse = [], weighted.source.raw
    weighted.source.raw = lambda row: read.append(row) or parse(row)
    check_both_labels([weighted])
    assert len(read) <= 3


def test_only_good_answers_in_the_part_of_a_stream_that_is_read_are_refused_as_such(tmp_path):
    labels = [True] * GOOD + [False]
    with pytest.raises(
        UserError, match=rf"only good answers \(label true\) \(of a stream, the first {GOOD} rows are read\);"
    ):
        check_both_labels(sources(tmp_path, labels, streaming=True))
    check_both_labels(sources(tmp_path, labels[1:], streaming=True))
