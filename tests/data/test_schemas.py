"""A dataset schema is registered in one place, and then recognized, read, checked and trained on like any
other."""

import json

import pytest

from flamingo_ft.config import DataSection, DataSource, tables
from flamingo_ft.data import encode, open_data, read_samples
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.fields import nonempty_text_field
from flamingo_ft.data.schemas import SCHEMAS, ParsedRow, Schema, Turn, register_schema
from flamingo_ft.data.schemas.schema import has_columns, images_of
from flamingo_ft.errors import UserError
from tests.check.small_recipes import checked
from tests.data.dialogues import nano_processor
from tests.data.fixtures import FACTS, put


def parse_riddle(row, where):
    turns = [
        Turn("user", nonempty_text_field(row, "riddle", where), f"{where}: riddle"),
        Turn("assistant", nonempty_text_field(row, "solved", where), f"{where}: solved"),
    ]
    return ParsedRow(turns, images_of(row, where))


@pytest.fixture
def riddles(tmp_path):
    """A file of a made-up format, which is registered for the time of a test."""
    register_schema(
        Schema(
            "riddles",
            fields=("riddle", "solved"),
            matches=has_columns("riddle", "solved"),
            parse=parse_riddle,
        ),
        description="riddle, solved, image",
    )
    rows = [
        {"riddle": "Which digit?", "solved": answer, "image": put(tmp_path, scan)} for scan, answer in FACTS
    ]
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path / "riddles.jsonl"
    del SCHEMAS["riddles"], tables.DATASET_FORMATS["riddles"]


@pytest.mark.parametrize("name", ["auto", "riddles"])
def test_a_registered_schema_is_read_and_encoded(riddles, name):
    samples = read_samples(DataSource(path=riddles, format=name))
    assert [len(sample.images) for sample in samples] == [1] * len(FACTS)
    processor = nano_processor()
    for sample, (_, answer) in zip(samples, FACTS, strict=True):
        encoded = encode(processor, sample)
        learned = [label for label in encoded.labels if label != IGNORED]
        assert encoded.images == 1 and processor.tokenizer.decode(learned).startswith(answer)


def test_a_registered_schema_is_checked_and_trained_on(riddles, tmp_path):
    found = checked(tmp_path, [{"path": str(riddles)}])
    assert (found.parts[0].samples, found.problems) == (len(FACTS), 0)
    data = open_data(DataSection(train=(DataSource(path=riddles),), eval_fraction=0.3), seed=0)
    assert (data.train[0].size, data.eval[0].size, data.train[0].source.format) == (2, 1, "riddles")


def test_a_registered_schema_is_named_in_errors(riddles, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(
        UserError, match=r"caption \(image, caption or text\); riddles \(riddle, solved, image\)$"
    ):
        read_samples(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="'caption' or 'riddles'"):
        DataSource(path=riddles, format="riddle")


def test_a_schema_without_a_name_for_recipes_is_refused():
    with pytest.raises(ValueError, match="riddles: not in config/tables.py"):
        register_schema(Schema("riddles", fields=(), matches=has_columns("riddle"), parse=parse_riddle))
