"""A run of an earlier version loads, merges and resumes with the current code, with the recorded results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from flamingo_ft import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.adapters import load_adapter, name_base, write_merged
from flamingo_ft.cli import main

from .make import KILLED_AFTER, PLACE, STEPS, answers, logits, losses, relocate, sha256, text_logits

STORED = Path(__file__).parent
EXPECTED = json.loads((STORED / "expected.json").read_text())
LOGITS = load_file(STORED / "logits.safetensors")


def assert_matches_recorded(name: str, model, processor) -> None:
    """Compare with the outputs of the earlier version; another CPU may round differently."""
    assert torch.allclose(logits(model, processor, STORED), LOGITS[name], rtol=1e-3, atol=1e-3)
    assert answers(model, processor, STORED) == EXPECTED[f"{name}_answers"]


def test_the_stored_adapter_changed_its_base():
    model, processor = load_adapter(STORED / "adapter", device="cpu")
    assert (text_logits(model, processor) - LOGITS["composition"]).abs().max() > 0.01
    adapter, merged = LOGITS["adapter"], LOGITS["merged"]
    assert 0.005 < (adapter - merged).abs().max() < 0.5


def test_a_stored_adapter_gives_the_recorded_outputs():
    assert_matches_recorded("adapter", *load_adapter(STORED / "adapter", device="cpu"))


def test_a_stored_composition_gives_the_recorded_outputs_alone_and_with_its_adapter(tmp_path):
    processor = FlamingoProcessor.from_pretrained(STORED / "composition")
    model = FlamingoForConditionalGeneration.from_pretrained(STORED / "composition").eval()
    assert torch.allclose(text_logits(model, processor), LOGITS["composition"], rtol=1e-3, atol=1e-3)
    shutil.copytree(STORED / "adapter", tmp_path / "adapter")
    name_base(tmp_path / "adapter", str(STORED / "composition"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert_matches_recorded("adapter", model.eval(), AutoProcessor.from_pretrained(tmp_path / "adapter"))


@pytest.fixture(scope="module")
def newly_merged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    processor = FlamingoProcessor.from_pretrained(STORED / "adapter")
    write_merged(STORED / "adapter", folder, processor)
    return folder


def test_merging_a_stored_adapter_gives_the_recorded_weights(newly_merged):
    actual = load_file(newly_merged / "model.safetensors")
    with_lora = load_file(STORED / "merged_with_lora.safetensors")
    assert actual.keys() == EXPECTED["merged_sha256"].keys() and len(with_lora) == 4
    for name, digest in EXPECTED["merged_sha256"].items():
        if name in with_lora:
            assert sha256(with_lora[name]) == digest
            assert torch.allclose(actual[name], with_lora[name], rtol=2**-7, atol=0), name
        else:
            assert sha256(actual[name]) == digest, name


def test_a_stored_merged_model_gives_the_recorded_outputs(newly_merged, tmp_path):
    folder = tmp_path / "merged"
    shutil.copytree(STORED / "merged", folder)
    weights = load_file(newly_merged / "model.safetensors")
    weights |= load_file(STORED / "merged_with_lora.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert {path.name for path in folder.iterdir()} == {*EXPECTED["merged_files"]}
    model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
    assert_matches_recorded("merged", model, FlamingoProcessor.from_pretrained(folder))


# New recipes have other defaults than those of the time the run is from.
EARLIER_DEFAULTS = ("train.learning_rates.gates=3.0e-2", "train.optimizer=adamw")


def test_a_stored_checkpoint_resumes_to_the_result_of_an_uninterrupted_run(tmp_path, monkeypatch, capsys):
    for path in STORED.iterdir():
        if path.suffix in (".png", ".jsonl", ".yaml"):
            shutil.copy(path, tmp_path)
    shutil.copytree(STORED / "run", tmp_path / "run")
    relocate(tmp_path / "run", PLACE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert set(losses(tmp_path / "run")) == {str(step + 1) for step in range(KILLED_AFTER)}
    assert main(["train", "./recipe.yaml", "--resume"]) == 2
    refusal = capsys.readouterr().err
    assert "train.learning_rates.gates was 0.03, is None" in refusal
    assert "train.optimizer was adamw, is muon" in refusal
    assert main(["train", "./recipe.yaml", "--resume", *EARLIER_DEFAULTS]) == 0
    assert losses(tmp_path / "run") == pytest.approx(EXPECTED["losses"], rel=1e-4)
    assert len(EXPECTED["losses"]) == STEPS
    resumed = load_file(Path("run", "adapter_model.safetensors"))
    expected = load_file(STORED / "adapter" / "adapter_model.safetensors")
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(resumed[name], tensor, rtol=1e-3, atol=1e-4), name
