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


def choices(*names: str) -> str:
    """The names as an error lists them: 'a', 'b' or 'c'."""
    *known, last = map(repr, names)
    return f"{', '.join(known)} or {last}"


def test_dataset_formats_are_the_schemas():
    assert {*SCHEMAS} == {*tables.DATASET_FORMATS}


def test_only_dataset_formats_of_the_table_are_accepted():
    assert all(DataSource(hub="org/name", format=name).format == name for name in tables.DATASET_FORMATS)
    with pytest.raises(ValueError, match=choices("auto", *tables.DATASET_FORMATS)):
        DataSource(hub="org/name", format="vga")


def test_every_part_has_its_keys_in_each_section():
    bridge = [part.name for part in tables.BRIDGE_PARTS]
    assert [*TrainableSection.model_fields] == [*bridge, "dtype"]
    assert [*RatesSection.model_fields] == [*bridge, "gates", "lora", "loraplus_lr_ratio"]
    assert [*DecaysSection.model_fields] == ["perceiver", "cross_attention", "lora"]
    assert [*LoraSection.model_fields][: len(tables.LORA_PARTS)] == [part.name for part in tables.LORA_PARTS]


def test_a_metric_that_is_added_to_the_table_is_accepted(monkeypatch):
    names = ", ".join(map(repr, tables.METRIC_DESCRIPTIONS))
    with pytest.raises(ValueError, match=f"{names} or FILE.py:function"):
        EvalSection(metric="made_up")
    with pytest.raises(ValueError, match="'accuracy', .* or FILE.py:function"):
        EvalSection(metrics=["accuracy", "made_up"])
    monkeypatch.setitem(tables.METRIC_DESCRIPTIONS, "made_up", "")
    assert EvalSection(metric="made_up").metric == "made_up"
    assert EvalSection(metrics=["made_up", "f1"]).metrics == ("made_up", "f1")


def test_the_loss_is_no_metric_of_answers():
    assert EvalSection(metric="loss").metric == "loss"
    with pytest.raises(ValueError, match="'accuracy', "):
        EvalSection(metrics=["loss"])
