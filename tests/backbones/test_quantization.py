"""Quantized layers and language models: values, identity, growing vocabulary, and saved quantized models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from flamingo_ft.backbones import quantization
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.provenance import files_sha256
from flamingo_ft.backbones.quantization import (
    Quantization,
    dequantize_linears,
    dequantized_weight,
    is_quantized,
    quantization_formats,
    quantize_linears,
)
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import grow_vocabulary
from tests.backbones.test_language import IDS, save_tokenizer
from tests.model.tiny import tiny_language_model

FORMATS = ("int8", "nf4", "fp4")
NEW_TOKENS = 2


def save(lm: PreTrainedModel, folder: Path) -> str:
    lm.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def load(name: str, quantization_format: str, **options) -> PreTrainedModel:
    return load_language(name, quantization=Quantization(quantization_format, **options), device="cpu").model


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# One matrix


@torch.compiler.set_stance("force_eager")  # for odd shapes, bitsandbytes would compile C++ for half a minute
@pytest.mark.parametrize("quantization_format, error", [("int8", 0.01), ("nf4", 0.11), ("fp4", 0.14)])
@pytest.mark.parametrize("shape", [(64, 48), (16, 33), (3, 5)])
def test_a_quantized_layer_multiplies_by_its_dequantized_matrix(quantization_format, error, shape):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"linear": nn.Linear(*shape)})
    plain, x = holder["linear"], torch.randn(4, shape[0])
    quantize_linears(holder, Quantization(quantization_format))
    matrix = dequantized_weight(holder["linear"])
    assert (matrix - plain.weight).norm() / plain.weight.norm() < error
    assert torch.equal(holder["linear"].bias, plain.bias)
    expected = nn.functional.linear(x, matrix, plain.bias)
    assert (holder["linear"](x) - expected).norm() / expected.norm() < 0.01


def test_an_8_bit_layer_takes_inputs_of_any_shape():
    torch.manual_seed(0)
    holder = nn.ModuleDict({"linear": nn.Linear(8, 6)})
    quantize_linears(holder, Quantization("int8"))
    x = torch.randn(2, 3, 4, 5, 8)
    flat = holder["linear"](x.flatten(0, -2))
    for end in (-1, -2, -3, -4):
        output = holder["linear"](x.flatten(0, end - 1))
        assert torch.equal(output.flatten(0, -2) if output.dim() > 2 else output, flat)
    assert holder["linear"](x[0, 0, 0, 0]).shape == (6,)


@pytest.mark.parametrize("quantization_format", FORMATS)
def test_kept_layers_stay_and_dequantizing_gives_plain_layers(quantization_format):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8, bias=False)})
    kept = holder["second"]
    quantize_linears(holder, Quantization(quantization_format), keep=lambda name: name == "second")
    assert is_quantized(holder["first"]) and holder["second"] is kept
    matrix = dequantized_weight(holder["first"])
    dequantize_linears(holder, torch.float32)
    assert type(holder["first"]) is nn.Linear and torch.equal(holder["first"].weight, matrix)


def test_from_record_inverts_record():
    for original in (
        Quantization("nf4", double_quantization=False, compute_dtype="bf16"),
        Quantization("int8"),
        None,
    ):
        record = json.loads(json.dumps(original.record())) if original else None
        assert Quantization.from_record(record) == original


@pytest.mark.parametrize("quantization_format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shardable_4_bit_matrices_have_another_storage_dtype_and_the_same_values(quantization_format, dtype):
    torch.manual_seed(0)
    usual, shardable = (
        Quantization(quantization_format, compute_dtype=dtype, shardable=choice) for choice in (False, True)
    )
    linear, holders = nn.Linear(64, 48), []
    for choice in (usual, shardable):
        holders.append(nn.ModuleDict({"linear": copy.deepcopy(linear)}))
        quantize_linears(holders[-1], choice)
    first, second = (holder["linear"] for holder in holders)
    assert first.weight.dtype == torch.uint8 and second.weight.dtype == shardable.dtype
    x = torch.randn(5, 64, dtype=shardable.dtype)
    assert torch.equal(first(x), second(x))
    assert torch.equal(dequantized_weight(first), dequantized_weight(second))
    assert shardable.record() == usual.record()


# Language models


@pytest.mark.parametrize("quantization_format", FORMATS)
def test_a_language_model_loads_with_all_matrices_quantized_but_its_head(quantization_format, tmp_path):
    torch.manual_seed(0)
    lm = tiny_language_model()
    name = save(lm, tmp_path)
    loaded = load_language(name, quantization=Quantization(quantization_format), device="cpu")
    plain = [part for part, module in loaded.model.named_modules() if type(module) is nn.Linear]
    assert plain == ["lm_head"]
    assert quantization_formats(loaded.model) == {"int8" if quantization_format == "int8" else "4bit"}
    assert torch.equal(loaded.model.lm_head.weight, lm.lm_head.weight)
    assert loaded.source == {
        "name": name,
        "revision": None,
        "sha256": files_sha256(tmp_path),
        "quantization": Quantization(quantization_format).record(),
    }
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    logits = loaded.model(input_ids=IDS).logits
    assert torch.cosine_similarity(logits, lm(input_ids=IDS).logits, dim=-1).mean() > 0.9


@pytest.mark.parametrize("quantization_format", ["int8", "nf4"])
def test_conv1d_matrices_are_quantized_in_the_right_orientation(quantization_format, tmp_path):
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=16)).eval()
    quantized = load(save(lm, tmp_path), quantization_format)
    assert is_quantized(quantized.transformer.h[0].attn.c_attn)
    logits = quantized(input_ids=IDS).logits
    assert torch.cosine_similarity(logits, lm(input_ids=IDS).logits, dim=-1).min() > 0.95
    dequantize_linears(quantized, torch.float32)
    assert quantized.state_dict().keys() == lm.state_dict().keys()
    shapes = [tuple(tensor.shape) for tensor in lm.state_dict().values()]
    assert [tuple(tensor.shape) for tensor in quantized.state_dict().values()] == shapes
    close = torch.cosine_similarity(quantized(input_ids=IDS).logits, logits, dim=-1).min()
    assert close > (0.9999 if quantization_format == "nf4" else 0.99)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quantization_format", ["int8", "nf4"])
def test_the_vocabulary_of_a_quantized_model_grows_and_old_rows_stay(quantization_format, tied, tmp_path):
    lm = load(save(tiny_language_model(tie_word_embeddings=tied), tmp_path), quantization_format)
    matrices = (lm.get_input_embeddings(), lm.get_output_embeddings())
    before = [matrix.weight.clone() for matrix in matrices]
    rows, logits = len(before[0]), lm(input_ids=IDS).logits
    grow_vocabulary(lm, rows + NEW_TOKENS)
    for matrix, kept in zip((lm.get_input_embeddings(), lm.get_output_embeddings()), before, strict=True):
        assert torch.equal(matrix.weight[:rows], kept) and len(matrix.weight) == rows + NEW_TOKENS
        torch.testing.assert_close(matrix.weight[rows:], kept.mean(0).expand(NEW_TOKENS, -1))
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    torch.testing.assert_close(lm(input_ids=IDS).logits[..., :rows], logits)
    assert lm(input_ids=torch.tensor([[3, rows, rows + 1]])).logits.isfinite().all()


def test_the_rest_of_a_language_model_is_in_the_compute_dtype(tmp_path):
    lm = load(save(tiny_language_model(), tmp_path), "nf4", compute_dtype="bf16")
    assert lm.lm_head.weight.dtype == lm.model.norm.weight.dtype == torch.bfloat16
    assert lm(input_ids=IDS).logits.dtype == torch.bfloat16


# Models that were saved quantized


def test_a_model_that_was_saved_quantized_loads_as_it_is(tmp_path):
    lm = load(save(tiny_language_model(), tmp_path / "plain"), "nf4")
    name = save(lm, tmp_path / "quantized")
    loaded = load_language(name)
    assert loaded.source["quantization"] is None and quantization_formats(loaded.model) == {"4bit"}
    assert torch.equal(loaded.model(input_ids=IDS).logits, lm(input_ids=IDS).logits)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "torchao", "bitsandbytes"])
def test_quantizing_a_quantized_model_is_refused(method, tmp_path):
    name = save(tiny_language_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method,
        "bits": 4,
        "load_in_4bit": method == "bitsandbytes",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(load_language, name, quantization=Quantization("nf4"))
    assert (
        f"quantization nf4 given, but it is already quantized ({method}); set quantization to none" in message
    )


# Without bitsandbytes


def test_without_bitsandbytes_quantization_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(quantization, "bitsandbytes", lambda: None)
    for loader in (load_language, load_vision):
        message = refusal(loader, "nano", quantization=Quantization("int8"))
        assert message == "quantization int8 needs bitsandbytes; pip install bitsandbytes, or use none"
    assert quantization_formats(load_vision("nano").visual) == set()
    assert load_language("nano").model is not None


@pytest.mark.slow
def test_the_package_works_without_bitsandbytes():
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from flamingo_ft import build_flamingo, load_language, load_vision\n"
        "build_flamingo(load_vision('nano'), load_language('nano'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_8_bit_layers_log_no_warnings(tmp_path, caplog):
    lm = load(save(tiny_language_model(), tmp_path), "int8")
    caplog.clear()
    lm(input_ids=IDS)
    assert not caplog.records


def test_bnb_config_sets_the_same_options_for_transformers():
    config = Quantization("nf4", compute_dtype="bf16").bnb_config()
    assert isinstance(config, BitsAndBytesConfig) and config.quantization_method() == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.bnb_4bit_use_double_quant
    assert Quantization("int8").bnb_config().quantization_method() == "llm_int8"
