"""A vision-language checkpoint loads as its language model, whichever version of transformers wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from flamingo_ft.adapters import load_adapter, save_adapter
from flamingo_ft.backbones.language import language_files, load_language
from flamingo_ft.backbones.text_part import text_part
from flamingo_ft.errors import UserError
from tests.hub_folders import bytes_tokenizer
from tests.model.tiny_language_models import tiny_config
from tests.regimes import LORA, build, logits, shake, write_run

TEXT = torch.tensor([[5, 6, 7, 8, 9]])
CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "llava_next": "LlamaForCausalLM",
    "mistral3": "Ministral3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
}
# Names as before transformers 5: of the released Gemma 3 and Ministral 3.
OLDER_NAMES = {r"^model\.language_model\.": "language_model.model.", r"^lm_head\.": "language_model.lm_head."}


def write_checkpoint(
    folder: Path, family: str, auto_class: Any = AutoModelForImageTextToText, **changes: Any
) -> PreTrainedModel:
    """Write a tiny random vision-language model and a tokenizer; return the model."""
    config = tiny_config(CONFIG_MAPPING[family], 320)
    if family == "mistral3":  # as in Ministral 3; Mistral Small 3 has a mistral
        config.text_config = tiny_config(CONFIG_MAPPING["ministral3"], 320)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_it_computes_what_the_whole_model_computes_for_text(family, tmp_path):
    whole = write_checkpoint(tmp_path, family)
    loaded = load_language(str(tmp_path)).model
    assert type(loaded).__name__ == CLASSES[family]
    torch.testing.assert_close(loaded(TEXT).logits, whole(input_ids=TEXT).logits)
    towers = ("vision_tower", "visual", "vision_encoder", "multi_modal_projector")
    assert not [name for name, _ in loaded.named_parameters() if any(tower in name for tower in towers)]
    assert type(language_files(str(tmp_path))[0]) is type(loaded.config)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fuyu", "gemma3n", "got_ocr2", "llama4", "qwen3_5_moe", "qwen4_exp"])
@torch.no_grad()
def test_it_computes_what_transformers_own_causal_class_computes(family, tmp_path):
    whole = write_checkpoint(tmp_path, family, AutoModelForCausalLM)
    loaded = load_language(str(tmp_path)).model
    assert loaded.config.model_type != family
    torch.testing.assert_close(loaded(TEXT).logits, whole(input_ids=TEXT).logits)


@pytest.mark.parametrize("family", ["bart", "llama", "whisper"])
def test_other_configurations_are_left_as_they_are(family):
    config = tiny_config(CONFIG_MAPPING[family], 320)
    assert text_part(config) is config


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_older_names_of_weights_load_too(tied, tmp_path):
    whole = write_checkpoint(tmp_path, "mistral3", tie_word_embeddings=tied)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for pattern, older in OLDER_NAMES.items():
        tensors = {re.sub(pattern, older, name): tensor for name, tensor in tensors.items()}
    assert any(name.startswith("language_model.model.layers.0") for name in tensors)
    assert ("language_model.lm_head.weight" in tensors) != tied
    save_file(tensors, file, {"format": "pt"})
    loaded = load_language(str(tmp_path)).model
    torch.testing.assert_close(loaded(TEXT).logits, whole(input_ids=TEXT).logits)
    assert loaded.config.tie_word_embeddings == tied


def test_lora_on_all_layers_trains_none_of_its_tower_and_the_adapter_loads_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_checkpoint(tmp_path / "lm", "gemma3")
    model, processor = build("model.language.name=./lm", LORA)
    adapted = [name for name, _ in model.lang_encoder.named_parameters() if "lora_A" in name]
    assert adapted and all(".layers." in name and "vision" not in name for name in adapted)
    shake(model)
    save_adapter(model, processor, tmp_path / "adapter")
    assert torch.equal(logits(*load_adapter("adapter")), logits(model, processor))


def test_a_vision_language_model_without_a_causal_text_class_is_refused(tmp_path):
    write_checkpoint(tmp_path, "qwen3_vl")
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3_vl"
    with pytest.raises(UserError, match="of type 'qwen3_vl', which is not a causal language model"):
        load_language(str(tmp_path))
