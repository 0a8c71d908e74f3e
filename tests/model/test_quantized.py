"""A whole Flamingo in 8 or 4 bits: quantized while it loads, saved, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import Quantization, is_quantized, quantization_formats
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.model import Flamingo, build_flamingo
from flamingo_ft.model.pretrained import mark_quantized

from .tiny import EOC, MEDIA, ids, images, open_gates, tiny_flamingo, tiny_language_model

INPUTS = ids("aIbIc"), images(1, 2)
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 4.0},
}
FORMAT = {"nf4": "4bit", "int8": "int8"}
EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "", "timm_proj": "", "image_size": 224}
TOWERS = {
    "clip": {},
    "convnext": {
        "vision_config": {
            "embed_dim": 16,
            "vision_cfg": {"timm_model_name": "test_convnext", "image_size": 160},
        },
        "vision_width": 64,
    },
    "eva": {"vision_config": {"embed_dim": 16, "vision_cfg": EVA}, "vision_width": 192},
}


@pytest.fixture(params=CONFIGS)
def wanted(request) -> str:
    return request.param


def load(folder: Path, wanted: str, **options) -> nn.Module:
    config = BitsAndBytesConfig(**CONFIGS[wanted], **options)
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


def plain_linears(model: nn.Module) -> list[str]:
    return [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and not is_quantized(part)
    ]


def saved(folder: Path, **options) -> Path:
    tiny_flamingo(**options).save_pretrained(folder)
    return folder


def test_every_matrix_but_the_language_models_head_is_quantized(wanted, tmp_path):
    model = load(saved(tmp_path), wanted)
    assert plain_linears(model) == ["lang_encoder.lm_head"]
    assert not any(isinstance(part, nn.MultiheadAttention) for part in model.modules())
    assert all(is_quantized(block.attn.in_proj) for block in model.vision_encoder.transformer.resblocks)
    assert quantization_formats(model) == {FORMAT[wanted]}


def test_gates_norms_latents_and_token_rows_keep_their_bits(wanted, tmp_path):
    expected = tiny_flamingo()
    expected.save_pretrained(tmp_path)
    found = dict(load(tmp_path, wanted).named_parameters())
    rows = ("token_rows.input.weight", "token_rows.output.weight", "embed_tokens.weight")
    kept = ("gate", "norm.weight", "latents", *rows)
    for name, parameter in expected.named_parameters():
        if name.endswith(kept):
            assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("tower", TOWERS)
def test_a_quantized_model_saved_and_loaded_gives_equal_logits(tower, wanted, tmp_path):
    options = TOWERS[tower]
    size = options.get("vision_config", {"vision_cfg": {"image_size": 16}})["vision_cfg"]["image_size"]
    inputs = ids("aIbIc"), torch.randn(1, 2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = load(saved(tmp_path / "plain", **options), wanted)
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert plain_linears(loaded) == plain_linears(model) == ["lang_encoder.lm_head"]
    assert torch.equal(loaded(*inputs).logits, model(*inputs).logits)


def test_saving_a_loaded_quantized_model_keeps_every_byte_of_its_weights(wanted, tmp_path):
    load(saved(tmp_path / "plain"), wanted).save_pretrained(tmp_path / "first")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_tied_head_stays_tied(wanted, tmp_path):
    model = load(saved(tmp_path, lm=tiny_language_model(tie_word_embeddings=True)), wanted)
    assert model.lang_encoder.lm_head.weight is model.lang_encoder.model.embed_tokens.weight
    assert plain_linears(model) == ["lang_encoder.lm_head"]


@pytest.mark.parametrize(
    "skipped, left",
    [
        (["vision_encoder"], "vision_encoder."),
        (["perceiver", "gated_cross_attn_layers"], ("perceiver.", "gated_cross_attn_layers.")),
        (["in_proj"], "vision_encoder."),
    ],
)
def test_modules_to_skip_are_skipped_and_the_head_with_them(skipped, left, wanted, tmp_path):
    model = load(saved(tmp_path / "plain"), wanted, llm_int8_skip_modules=skipped)
    others = [name for name in plain_linears(model) if not name.startswith(left)]
    assert others == ["lang_encoder.lm_head"] and len(plain_linears(model)) > 1
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert plain_linears(loaded) == plain_linears(model)
    assert torch.equal(loaded(*INPUTS).logits, model(*INPUTS).logits)


def test_the_users_own_configuration_object_is_left_alone(tmp_path):
    given = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForImageTextToText.from_pretrained(saved(tmp_path), quantization_config=given)
    assert given.llm_int8_skip_modules is None


def test_the_class_itself_loads_quantized_as_the_auto_class_does(wanted, tmp_path):
    saved(tmp_path)
    expected = load(tmp_path, wanted)
    config = BitsAndBytesConfig(**CONFIGS[wanted])
    options = {"quantization_config": config, "output_loading_info": True}
    found, report = type(expected).from_pretrained(tmp_path, **options)
    assert not report["missing_keys"] and plain_linears(found) == ["lang_encoder.lm_head"]
    assert torch.equal(found(*INPUTS).logits, expected(*INPUTS).logits)


@pytest.mark.parametrize("wanted, least", [("int8", 0.999), ("nf4", 0.97)])
def test_the_nano_flamingo_loads_quantized_and_answers_much_the_same(wanted, least, tmp_path):
    torch.manual_seed(0)
    model, processor = build_flamingo(load_vision("nano"), load_language("nano"))
    open_gates(model.eval())
    model.save_pretrained(tmp_path / "plain")
    found = load(tmp_path / "plain", wanted)
    text = processor.tokenizer("<image>Which digit is this?", return_tensors="pt").input_ids
    inputs = text, torch.randn(1, 1, 3, *model.vision_encoder.image_size)
    logits = found(*inputs).logits
    assert torch.cosine_similarity(logits, model(*inputs).logits, dim=-1).mean() > least
    found.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert torch.equal(loaded(*inputs).logits, logits)


# Put together from quantized backbones


def assemble_model(vision: str | None, language: str | None) -> nn.Module:
    backbones = (
        load("nano", quantization=Quantization(wanted) if wanted else None, device="cpu")
        for load, wanted in ((load_vision, vision), (load_language, language))
    )
    return build_flamingo(*backbones)[0].eval()


@pytest.mark.parametrize(
    "vision, language, flags",
    [
        (None, None, (False, False)),
        ("nf4", None, (True, False)),
        (None, "int8", (False, True)),
        ("int8", "fp4", (True, True)),
    ],
)
def test_a_model_tells_peft_what_its_parts_are_kept_in(vision, language, flags):
    model = assemble_model(vision, language)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == flags
    assert model.config.open_attention == (vision is not None)
    logits = model(torch.tensor([[3, model.config.media_token_id, 4]]), torch.randn(1, 1, 3, 32, 32)).logits
    assert logits.isfinite().all()


def test_open_flamingos_face_tells_it_too():
    tower = load_vision("nano", quantization=Quantization("nf4"), device="cpu")
    model = Flamingo(tower.visual, tiny_language_model(), EOC, MEDIA, tower.width)
    assert model.is_loaded_in_4bit and not model.is_loaded_in_8bit


def test_lora_on_a_quantized_flamingo_wraps_bitsandbytes_layers():
    model = assemble_model("nf4", "int8")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["in_proj", "q_proj"]))
    layers = {
        type(part).__name__ for part in wrapped.modules() if type(part).__module__ == "peft.tuners.lora.bnb"
    }
    assert layers == {"Linear4bit", "Linear8bitLt"}


def test_a_model_put_together_from_quantized_backbones_is_not_saved_whole(tmp_path):
    with pytest.raises(UserError, match="save its adapter") as caught:
        assemble_model("nf4", None).save_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_opened_tower_is_saved_open(tmp_path):
    model = tiny_flamingo(open_attention=True)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).open_attention
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(*INPUTS).logits, model(*INPUTS).logits)
    mark_quantized(loaded)
    assert not loaded.is_loaded_in_4bit and not loaded.is_loaded_in_8bit
