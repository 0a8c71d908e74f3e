"""MPT-1B without remote code computes the original's numbers (tests/golden) from the files of the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo_ft.backbones.language import language_files, load_language
from flamingo_ft.backbones.mosaic_gpt import MosaicGptConfig, MosaicGptForCausalLM
from flamingo_ft.backbones.quantization import Quantization, is_quantized
from flamingo_ft.errors import UserError
from flamingo_ft.training.preflight import check_packing
from tests.golden import mosaic_gpt as golden
from tests.golden.cases import left_padded, prompts
from tests.golden.deterministic_weights import fill
from tests.golden.measurements import gradient_table
from tests.golden.recorded import TOLERANCE
from tests.golden.tiny_models import EOC_TOKEN, MEDIA_TOKEN, PAD_TOKEN
from tests.hub_folders import MOSAIC_GPT, write_language_model
from tests.model.tiny import tiny_flamingo

RECORDED = load_file(golden.FILE)


def original() -> MosaicGptForCausalLM:
    """Return the model whose numbers were recorded."""
    model = MosaicGptForCausalLM(MosaicGptConfig(**golden.SHAPE, **golden.KIND)).eval()
    fill(model, "lang_encoder.")
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write the recorded model as the Hub has it: with remote code named, and pickled weights in shards."""
    return write_language_model(tmp_path / "mpt-1b", {**MOSAIC_GPT, **golden.SHAPE}, original().state_dict())


def distance(actual: torch.Tensor, name: str) -> float:
    return float((actual - RECORDED[name]).abs().max() / RECORDED[name].abs().max())


def test_logits_and_tokens_are_those_of_the_original():
    result = golden.measure(original())
    assert distance(result["left_padded"], "left_padded") < TOLERANCE
    assert distance(result["continued"], "continued") < TOLERANCE
    assert torch.equal(result["greedy"], RECORDED["greedy"])


def test_loss_and_gradients_are_those_of_the_original():
    model = original().double()
    loss, gradients = golden.loss_gradients(model)
    assert float(loss) == pytest.approx(float(RECORDED["loss"]), rel=TOLERANCE)
    table, recorded = gradient_table(gradients), RECORDED["gradients"]
    assert table.shape == recorded.shape
    assert ((table - recorded).abs() / recorded[:, :1]).max() < 1e-6
    batch = left_padded()
    model_loss = model(
        batch.input_ids, attention_mask=batch.attention_mask, labels=golden.labels(batch)
    ).loss.detach()
    assert float(model_loss) == pytest.approx(float(loss), rel=1e-6)  # transformers sums it in float32


def test_hub_files_load_without_remote_code_and_are_saved_under_the_same_names(folder, tmp_path):
    loaded = load_language(str(folder))
    assert distance(golden.measure(loaded.model)["left_padded"], "left_padded") < TOLERANCE
    loaded.model.save_pretrained(tmp_path / "saved")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == index["weight_map"].keys()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(golden.measure(saved)["left_padded"], golden.measure(loaded.model)["left_padded"])


def test_generation_gives_the_originals_tokens_with_and_without_a_cache(folder):
    model, batch = load_language(str(folder)).model, prompts()
    options = {
        "attention_mask": batch.attention_mask, "pad_token_id": PAD_TOKEN,
        "max_new_tokens": golden.NEW_TOKENS, "do_sample": False,
        "no_repeat_ngram_size": 1, "suppress_tokens": [MEDIA_TOKEN, EOC_TOKEN],
    }  # fmt: skip
    for use_cache in (True, False):
        tokens = model.generate(batch.input_ids, use_cache=use_cache, **options)
        assert torch.equal(tokens[:, batch.input_ids.shape[1] :], RECORDED["greedy"])
    beams = [model.generate(batch.input_ids, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams) and not torch.equal(beams[0], tokens)


def test_padding_on_the_left_changes_nothing():
    model, batch = original(), prompts()
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    for row, mask in enumerate(batch.attention_mask.bool()):
        alone = model(batch.input_ids[row][mask][None]).logits[0]
        torch.testing.assert_close(logits[row][mask], alone, rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    model = original().train()
    _, expected = golden.loss_gradients(model)
    model.gradient_checkpointing_enable()
    _, gradients = golden.loss_gradients(model)
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


def test_every_matrix_but_the_heads_is_quantized(folder):
    model = load_language(str(folder), quantization=Quantization("nf4")).model
    quantized = {name.split(".", 3)[3] for name, module in model.named_modules() if is_quantized(module)}
    assert quantized == {"attn.Wqkv", "attn.out_proj", "mlp.mlp_up", "mlp.mlp_down"}
    exact = golden.measure(original())["left_padded"]
    actual = golden.measure(model)["left_padded"]
    assert torch.cosine_similarity(actual, exact, dim=-1).mean() > 0.97


def test_packed_documents_do_not_attend_to_each_other():
    check_packing(tiny_flamingo(lm=original()), rows=2)


@pytest.mark.parametrize(("key", "value"), [("alibi", False), ("attn_qk_ln", False), ("logit_scale", 0.5)])
def test_unsupported_variants_of_the_architecture_are_refused_in_one_line(key, value, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(
        UserError,
        match=f"^language model [^\n]* {key}: a mosaic_gpt model supports only [^\n]*, got {value}; [^\n]*$",
    ):
        load_language(str(folder))


def test_keys_about_training_stay_in_the_configuration(folder, tmp_path):
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in ("param_init_fn", "attn_impl", "alibi", "softmax_scale", "tokenizer_name"):
        assert saved[key] == MOSAIC_GPT[key]


def test_the_tokenizer_named_in_the_configuration_is_loaded_if_the_model_has_none(folder, tmp_path):
    (tmp_path / "words").mkdir()
    for file in folder.glob("*token*.json"):
        file.rename(tmp_path / "words" / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_name": str(tmp_path / "words")}))
    for tokenizer in (load_language(str(folder)).tokenizer, language_files(str(folder))[1]):
        assert tokenizer.decode(tokenizer.encode("a digit")) == "a digit"
