"""Adapters of earlier versions load and give the recorded logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from flamingo_ft.adapters import load_adapter
from flamingo_ft.model.configuration import FORMAT_VERSION

from .stored.make import EXPECTED, what_it_says

STORED = sorted(path.parent for path in (Path(__file__).parent / "stored").glob(f"*/{EXPECTED}"))


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_stored_adapter_gives_the_recorded_logits(folder):
    expected = load_file(folder / EXPECTED)["logits"]
    assert torch.allclose(what_it_says(*load_adapter(folder)), expected, rtol=1e-3, atol=1e-3)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    assert torch.allclose(what_it_says(model, processor), expected, rtol=1e-3, atol=1e-3)


def test_the_stored_adapters_have_different_logits():
    said = [load_file(folder / EXPECTED)["logits"] for folder in STORED]
    assert len(said) >= 3 and all(
        (one - two).abs().max() > 0.1 for i, one in enumerate(said) for two in said[:i]
    )


def test_each_format_version_has_a_stored_adapter():
    """A new FORMAT_VERSION comes with an adapter of its own in `stored`; those of the former ones stay."""
    versions = {json.loads((folder / "config.json").read_text())["format_version"] for folder in STORED}
    assert versions == {*range(1, FORMAT_VERSION + 1)}
