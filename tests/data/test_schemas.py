"""The schema documented in `schemas/schema.py` is recognized, read, checked and trained on like any other."""

import json
import textwrap

import pytest

from flamingo_ft.config import DataSection, DataSource, tables
from flamingo_ft.data import encode, open_data, read_samples
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.data.schemas import SCHEMAS, Schema, register_schema, schema
from flamingo_ft.data.schemas.schema import has_columns
from flamingo_ft.errors import UserError
from tests.check.small_recipes import checked
from tests.data.dialogues import nano_processor
from tests.data.fixtures import FACTS, put


def documented_example() -> str:
    """Return the file that the docstring of `schemas/schema.py` shows."""
    lines = schema.__doc__.splitlines()
    example = [line for line in lines if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(example)).strip()


@pytest.fixture
def riddles(tmp_path, monkeypatch):
    """A file of the documented format, which is registered during a test."""
    monkeypatch.setitem(tables.DATASET_FORMATS, "riddles", "photo, riddle, solution")
    monkeypatch.setitem(SCHEMAS, "riddles", None)
    exec(documented_example(), {"__package__": schema.__package__})
    rows = [
        {"Photo": put(tmp_path, scan), "riddle": "Which digit?", "solution": answer} for scan, answer in FACTS
    ]
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "riddles.jsonl"


@pytest.mark.parametrize("name", ["auto", "riddles"])
def test_the_documented_schema_is_read_and_encoded(riddles, name):
    samples = read_samples(DataSource(path=riddles, format=name))
    assert [len(sample.images) for sample in samples] == [1] * len(FACTS)
    assert all(sample.unread == () for sample in samples)
    processor = nano_processor()
    for sample, (_, answer) in zip(samples, FACTS, strict=True):
        encoded = encode(processor, sample)
        labels = [label for label in encoded.labels if label != IGNORED]
        assert encoded.images == 1 and processor.tokenizer.decode(labels).startswith(answer)


def test_the_documented_schema_is_checked_and_trained_on(riddles, tmp_path):
    report = checked(tmp_path, [{"path": str(riddles)}])
    assert (report.parts[0].samples, report.problems) == (len(FACTS), 0)
    data = open_data(DataSection(train=(DataSource(path=riddles),), eval_fraction=0.3), seed=0)
    assert (data.train[0].size, data.eval[0].size, data.train[0].source.format) == (2, 1, "riddles")


def test_the_documented_schema_reports_a_missing_photo(riddles):
    riddles.write_text(json.dumps({"photo": None, "riddle": "Which digit?", "solution": "One."}))
    with pytest.raises(UserError, match="row 0: photo: expected the path of an image, got null .no value.$"):
        read_samples(riddles)


def test_errors_list_every_registered_schema(riddles, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError) as caught:
        read_samples(tmp_path / "other.jsonl")
    formats = ", ".join(tables.DATASET_FORMATS)
    assert "riddles" in formats and f"or use those of a format ({formats}; " in str(caught.value)
    *_, before, last = tables.DATASET_FORMATS
    with pytest.raises(ValueError, match=f"'{before}' or '{last}'"):
        DataSource(path=riddles, format="riddle")


def test_a_schema_outside_the_package_is_registered_with_a_description(monkeypatch):
    monkeypatch.setitem(SCHEMAS, "rows", None)
    monkeypatch.setitem(tables.DATASET_FORMATS, "rows", "")
    registered = register_schema(Schema("rows", ("a",), has_columns("a")), description="a")
    assert SCHEMAS["rows"] is registered and tables.DATASET_FORMATS["rows"] == "a"


def test_a_schema_without_a_name_for_recipes_is_refused():
    with pytest.raises(ValueError, match="riddles: not in config/tables.py"):
        register_schema(Schema("riddles", fields=(), matches=has_columns("riddle")))
