"""Adapters of earlier versions load and give the recorded logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from flamingo_ft.adapters import load_adapter
from flamingo_ft.model.configuration import FORMAT_VERSION

from .stored.make import EXPECTED, prompt_logits

STORED = sorted(path.parent for path in (Path(__file__).parent / "stored").glob(f"*/{EXPECTED}"))


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_stored_adapter_gives_the_recorded_logits(folder):
    expected = load_file(folder / EXPECTED)["logits"]
    assert torch.allclose(prompt_logits(*load_adapter(folder)), expected, rtol=1e-3, atol=1e-3)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert torch.allclose(prompt_logits(model, processor), expected, rtol=1e-3, atol=1e-3)


def test_the_stored_adapters_have_different_logits():
    stored = [load_file(folder / EXPECTED)["logits"] for folder in STORED]
    assert len(stored) >= 3
    assert all((one - two).abs().max() > 0.1 for i, one in enumerate(stored) for two in stored[:i])


def test_each_format_version_has_a_stored_adapter():
    """With a new FORMAT_VERSION, add an adapter to `stored`; keep those of earlier versions."""
    versions = {json.loads((folder / "config.json").read_text())["format_version"] for folder in STORED}
    assert versions == {*range(1, FORMAT_VERSION + 1)}
