"""The language models of the released Flamingos work like any other, without running their remote code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters import load_adapter, load_trained, save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import quantization_formats
from flamingo_ft.evaluation.merging import merge_adapter

from ..hub_folders import write_stand_in
from ..regimes import LORA, build, logits, quantized, shake

LINEAR = {
    "mosaic_gpt": {"attn.Wqkv", "attn.out_proj", "mlp.mlp_up", "mlp.mlp_down"},
    "mpt": {"attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"},
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
LAYERS = 2
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("mpt", "gpt_neox")]  # transformers' own


@pytest.fixture
def family(request, small_run) -> str:
    write_stand_in(Path("lm"), request.param, LAYERS)
    return request.param


@pytest.mark.parametrize("family", LINEAR, indirect=True)
def test_all_weights_load_without_remote_code(family):
    loaded = load_language("./lm")
    assert loaded.model.config.model_type == family
    assert type(loaded.model).__module__.split(".")[0] in ("transformers", "flamingo_ft")
    stored = {name: tensor for file in Path("lm").glob("*.bin") for name, tensor in torch.load(file).items()}
    state = loaded.model.state_dict()
    assert state.keys() - stored.keys() <= {"lm_head.weight"} and not stored.keys() - state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    words = loaded.tokenizer.encode("Which digit is this?")
    assert loaded.tokenizer.decode(words) == "Which digit is this?"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mosaic_gpt", *OTHERS], indirect=True)
def test_an_adapter_on_them_loads_in_4_bits_and_merges(family):
    settings = ("model.language.name=./lm", *quantized("nf4"), LORA)
    model, processor = build(*settings)
    assert quantization_formats(model.lang_encoder) == {"4bit"}
    lora_layers = {
        name.split(".lora_A")[0] for name, _ in model.lang_encoder.named_parameters() if "lora_A" in name
    }
    assert len(lora_layers) == LAYERS * len(LINEAR[family])
    assert {name.split(".", 3)[3] for name in lora_layers} == LINEAR[family]
    shake(model, 0.03)
    save_adapter(model, processor, Path("adapter"))
    expected = logits(model, processor)
    assert torch.equal(logits(*load_adapter("adapter")), expected)
    merge_adapter("adapter", "merged", base="dequantized", dtype=torch.float32)
    merged = logits(*load_trained("merged"))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
