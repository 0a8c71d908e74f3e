"""The tables of parts, formats and metrics match the recipe's keys and the code behind them."""

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


def test_dataset_formats_are_the_schemas():
    assert {*SCHEMAS} == {*tables.DATASET_FORMATS}


def test_only_dataset_formats_of_the_table_are_accepted():
    assert all(DataSource(hub="org/name", format=name).format == name for name in tables.DATASET_FORMATS)
    *_, before, last = tables.DATASET_FORMATS
    with pytest.raises(ValueError, match=f"'{before}' or '{last}'"):
        DataSource(hub="org/name", format="vga")


def test_every_part_has_its_keys_in_each_section():
    bridge = [part.name for part in tables.BRIDGE_PARTS]
    assert [*TrainableSection.model_fields] == [*bridge, "dtype"]
    assert [*RatesSection.model_fields] == [*bridge, "lora"]
    assert [*DecaysSection.model_fields] == ["perceiver", "cross_attention", "lora"]
    assert [*LoraSection.model_fields][: len(tables.LORA_PARTS)] == [part.name for part in tables.LORA_PARTS]


def test_a_metric_that_is_added_to_the_table_is_accepted(monkeypatch):
    with pytest.raises(ValueError, match="'loss' or 'accuracy'"):
        EvalSection(metric="f1")
    monkeypatch.setitem(tables.METRIC_DESCRIPTIONS, "f1", "")
    assert EvalSection(metric="f1").metric == "f1"
