"""What a recipe can name has behaviour in the folder that owns it."""

import pytest

from flamingo_ft.config import (
    DataSource,
    DecaysSection,
    EvalSection,
    LoraSection,
    RatesSection,
    TrainableSection,
    tables,
)
from flamingo_ft.data.schemas import SCHEMAS


def test_every_dataset_format_has_a_schema_and_every_schema_can_be_named():
    assert {*SCHEMAS} == {*tables.DATASET_FORMATS}


def test_every_dataset_format_can_be_named_and_no_other():
    assert all(DataSource(hub="org/name", format=name).format == name for name in tables.DATASET_FORMATS)
    *_, before, last = tables.DATASET_FORMATS
    with pytest.raises(ValueError, match=f"'{before}' or '{last}'"):
        DataSource(hub="org/name", format="vga")


def test_every_part_has_its_keys():
    bridge = [part.name for part in tables.BRIDGE_PARTS]
    assert [*TrainableSection.model_fields] == [*bridge, "dtype"]
    assert [*RatesSection.model_fields] == [*bridge, "lora"]
    assert [*DecaysSection.model_fields] == ["perceiver", "cross_attention", "lora"]
    assert [*LoraSection.model_fields][: len(tables.LORA_PARTS)] == [part.name for part in tables.LORA_PARTS]


def test_a_metric_that_is_added_to_the_table_can_be_named(monkeypatch):
    with pytest.raises(ValueError, match="'loss' or 'accuracy'"):
        EvalSection(metric="f1")
    monkeypatch.setitem(tables.METRICS, "f1", "")
    assert EvalSection(metric="f1").metric == "f1"
