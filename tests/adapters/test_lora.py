"""LoRA: its targets, its initializations, and errors for what the weights do not allow."""

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from flamingo_ft.adapters import load_adapter, save_adapter, set_trainable, trainable_parameters
from flamingo_ft.adapters.lora import _pattern, add_lora, find_targets
from flamingo_ft.adapters.lora_init import UnquantizedWeights
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.quantization import dequantized_weight
from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import modules_after_tokens
from flamingo_ft.config import LoraPart, LoraSection, TrainableSection
from flamingo_ft.errors import UserError
from flamingo_ft.model import build_flamingo
from flamingo_ft.training.build import build_model

from ..regimes import LORA, NOTHING_WHOLE, REGIMES, build, inputs, logits, quantized, recipe, shake


def small_siglip() -> dict:
    """A timm ViT with SigLIP's attention pool."""
    timm = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 224,
    }
    return {"embed_dim": 192, "vision_cfg": timm, "quick_gelu": False}


def layers(model, prefix: str = "") -> dict[str, LoraLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and n.startswith(prefix)}


def lora_product(layer: LoraLayer) -> torch.Tensor:
    """Return scaling * B @ A, which is added to the matrix."""
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


# --- targets ---


def test_each_part_has_its_own_rank_alpha_and_targets(small_run):
    model, _ = build(*REGIMES["LoRA everywhere"])
    shapes = {
        "lang_encoder.": (4, 2.0),
        "gated": (2, 16.0),
        "perceiver.": (3, 32 / 3),
        "vision_encoder.": (2, 16.0),
    }
    for prefix, (rank, scaling) in shapes.items():
        lora_layers = layers(model, prefix)
        assert lora_layers
        for layer in lora_layers.values():
            assert layer.r["default"] == rank and layer.scaling["default"] == scaling
    assert {name.rpartition(".")[2] for name in layers(model, "vision_encoder.")} == {"in_proj"}
    assert not isinstance(model.lang_encoder.lm_head, LoraLayer)


def test_all_linear_is_every_matrix_of_the_part_but_the_head(small_run):
    model, _ = build()
    targets = find_targets(model, "language", LoraPart())
    matrices = [
        n for n, m in model.lang_encoder.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    assert targets == [f"lang_encoder.{name}" for name in matrices]


def test_gpt2s_conv1d_layers_get_lora_too():
    language = load_language("nano")
    config = GPT2Config(vocab_size=len(language.tokenizer), n_layer=2, n_head=2, n_embd=16)
    backbone = LanguageBackbone(GPT2LMHeadModel(config), language.tokenizer, {})
    sizes = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    model, _ = build_flamingo(load_vision("nano"), backbone, perceiver=sizes)
    add_lora(model, LoraSection(language=LoraPart(r=2)))
    assert len(layers(model, "lang_encoder.")) == 2 * 4


@pytest.mark.parametrize(
    ("part", "target", "message"),
    [
        ("language", "query_key_value", "language part; it has model.layers.*.self_attn.q_proj, "),
        ("language", "lm_head", "lm_head matches no matrix of the language part"),
        (
            "vision",
            "q_proj",
            "it has transformer.resblocks.*.attn.in_proj, transformer.resblocks.*.attn.out_proj",
        ),
        ("cross_attention", "q_proj", "it has *.attn.to_q, *.attn.to_kv"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_what_exists(small_run, part, target, message):
    off = (f"trainable.{part}=false",) if part == "cross_attention" else ()
    with pytest.raises(UserError) as error:
        build(f"lora.{part}={{r: 2, target_modules: [{target}]}}", *off)
    text = str(error.value)
    assert text.startswith(f"lora.{part}.target_modules: {target} matches no matrix") and message in text
    assert "\n" not in text


NAMES = [
    f"{part}.layers.{n}.{leaf}"
    for part in ("lm", "tower")
    for n in range(12)
    for leaf in ("q", "k.1", "mlp.up")
]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_pattern_matches_the_chosen_matrices_and_no_other(chosen):
    pattern = _pattern(sorted(chosen), NAMES)
    assert {name for name in NAMES if re.fullmatch(pattern, name)} == chosen


# --- initialization ---


@pytest.mark.parametrize(
    "how", ["lora.init_lora_weights=default", "lora.init_lora_weights=gaussian", "lora.use_dora=true"]
)
def test_new_lora_changes_nothing(small_run, how):
    expected = logits(*build("model.init_from=start"))
    actual = logits(*build(LORA, how, "model.init_from=start"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_tower_layers_that_patch_tokens_do_not_depend_on_get_no_lora(small_run):
    """An attention pooler comes after them and would never get a gradient."""
    visual = build_visual(small_siglip())
    pooler = {
        name for name, m in visual.named_modules() if "attn_pool" in name and isinstance(m, torch.nn.Linear)
    }
    after = modules_after_tokens(visual)
    assert pooler and all(visual.get_submodule(name) in after for name in pooler)
    assert not any(
        visual.get_submodule(name) in after
        for name, m in visual.named_modules()
        if "blocks" in name and "mlp.fc" in name
    )


def test_a_convolutional_tower_has_no_linear_layers_for_lora(small_run):
    with pytest.raises(
        UserError, match="lora.vision.target_modules: all-linear matches no matrix of the vision part"
    ):
        build("model.vision={name: RN50}", "lora.vision={r: 2}")


def test_rslora_scales_by_the_root_of_the_rank(small_run):
    model, _ = build(LORA, "lora.use_rslora=true")
    assert {layer.scaling["default"] for layer in layers(model).values()} == {8 / 4**0.5}


@pytest.mark.parametrize(
    ("settings", "scaled_by_root"),
    [
        (("lora.language={r: 64}",), True),
        (("lora.language={r: 63}",), False),
        (("lora.language={r: 64}", "lora.vision={r: 8}"), False),
        (("lora.language={r: 64}", "lora.use_rslora=false"), False),
        (("lora.language={r: 64}", "lora.init_lora_weights=pissa"), False),
    ],
)
def test_rslora_is_the_default_from_rank_64_of_every_part(small_run, settings, scaled_by_root):
    assert recipe(*settings).lora.rank_stabilized is scaled_by_root


def test_the_default_of_rslora_reaches_the_layers_the_adapter_and_the_merged_matrix(small_run):
    model, processor = build("lora.language={r: 64, lora_alpha: 16}")
    shake(model)
    assert {layer.scaling["default"] for layer in layers(model).values()} == {16 / 64**0.5}
    save_adapter(model, processor, Path("adapter"))
    loaded, _ = load_adapter("adapter")
    name = "lang_encoder.model.layers.0.mlp.up_proj"
    layer = loaded.get_submodule(name)
    assert layer.scaling["default"] == 2.0
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 2.0 * product)


def test_a_default_of_rslora_follows_the_adapter_that_training_begins_from(small_run):
    rank = "lora.language={r: 64}"
    model, processor = build(rank, "lora.use_rslora=false")
    shake(model)
    save_adapter(model, processor, Path("plain"))
    further, _ = build(rank, "model.init_from=plain")
    torch.testing.assert_close(logits(further, processor), logits(model, processor))
    with pytest.raises(UserError, match="plain has LoRA with use_rslora False, the recipe True"):
        build(rank, "model.init_from=plain", "lora.use_rslora=true")


def test_dropout_applies_to_the_inputs_of_lora(small_run):
    model, _ = build(LORA, "lora.lora_dropout=0.25", "lora.vision={r: 2}")
    assert {layer.lora_dropout["default"].p for layer in layers(model).values()} == {0.25}


def test_pissa_changes_nothing_at_first_and_is_saved_as_lora_on_the_original_base(small_run):
    plain, _ = build("model.init_from=start")
    parts = (LORA, "lora.vision={r: 2}")
    model, processor = build(*parts, "lora.init_lora_weights=pissa", "model.init_from=start")
    torch.testing.assert_close(logits(model, processor), logits(plain, processor), rtol=0, atol=1e-4)
    name = "lang_encoder.model.layers.0.mlp.up_proj"
    weight, layer = plain.get_submodule(name).weight, model.get_submodule(name)
    left, values, right = torch.linalg.svd(weight.double())
    torch.testing.assert_close(
        lora_product(layer).double(), left[:, :4] * values[:4] @ right[:4], rtol=1e-4, atol=1e-5
    )
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    loaded, _ = load_adapter("adapter")
    ranks = {part: layer.r["default"] for part, layer in layers(loaded).items()}
    assert ranks == {part: 2 * layer.r["default"] for part, layer in layers(model).items()}
    assert {*ranks.values()} == {4, 8}
    assert torch.equal(loaded.get_submodule(name).get_base_layer().weight, weight)
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor), rtol=0, atol=2e-4)


def test_loftq_starts_at_the_best_approximation_of_the_quantization_error(small_run):
    overrides = (*quantized("nf4", "LoRA"), NOTHING_WHOLE, LORA, "model.init_from=start")
    parts = ("lora.cross_attention={r: 2}", "lora.vision={r: 2}")
    model, _ = build(*overrides, *parts, "lora.init_lora_weights=loftq")
    unquantized = UnquantizedWeights(model)
    for name, layer in layers(model).items():
        dequantized = dequantized_weight(layer.get_base_layer()).double()
        lost = unquantized[name].double() - dequantized
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank = layer.r["default"]
        best = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(lora_product(layer).double(), best, rtol=1e-3, atol=1e-5)
        assert 0 < (lost - best).norm() < 0.99 * lost.norm()


def test_eva_starts_at_the_principal_directions_of_a_layers_inputs(small_run):
    """On one batch, the paper's incremental PCA equals ordinary PCA, computed here in float64."""
    layer_inputs = []

    def some_batches(model, processor):
        layer = model.get_submodule("lang_encoder.model.layers.1.mlp.down_proj")
        layer.register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0].detach().flatten(0, -2)))
        return [inputs(processor)]

    config = recipe("lora.language={r: 3, target_modules: [down_proj]}", "lora.init_lora_weights=eva")
    model, _ = build_model(config, some_batches)
    layer = model.get_submodule("lang_encoder.model.layers.1.mlp.down_proj")
    rows_of_a = layer.lora_A["default"].weight.double()
    rows = layer_inputs[0].double()
    directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]
    torch.testing.assert_close(
        (rows_of_a @ directions.T).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-3
    )
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*quantized("nf4"), "lora.init_lora_weights=pissa"),
            "pissa takes the LoRA weights out of the matrix, and lang_encoder.",
        ),
        (("lora.init_lora_weights=pissa", "lora.use_dora=true"), "pissa is saved as LoRA of twice the rank"),
        (
            ("lora.init_lora_weights=loftq",),
            "loftq makes up for what 4-bit quantization lost, and lang_encoder.",
        ),
        (
            ("lora.init_lora_weights=pissa", "lora.perceiver={r: 2}", "trainable.perceiver=false"),
            "pissa takes the LoRA weights out of the matrix, and a new bridge is saved whole",
        ),
        (
            (*quantized("int8"), "lora.init_lora_weights=loftq"),
            "loftq makes up for what 4-bit quantization lost, and lang_encoder.",
        ),
        (
            ("lora.init_lora_weights=eva",),
            "eva needs training batches, got none; use default, or another initialization",
        ),
    ],
)
def test_an_initialization_that_the_weights_do_not_allow_is_refused(small_run, overrides, message):
    with pytest.raises(UserError) as error:
        build(LORA, *overrides)
    assert f"lora.init_lora_weights: {message}" in str(error.value) and "\n" not in str(error.value)


def test_the_tower_trains_through_its_lora_only(small_run):
    model, processor = build("lora.vision={r: 2}", "model.init_from=start")
    model.train()(**inputs(processor)).logits.sum().backward()
    with_gradient = {
        n for n, p in model.named_parameters() if n.startswith("vision_encoder.") and p.grad is not None
    }
    declared = {n for n in trainable_parameters(model) if n.startswith("vision_encoder.")}
    assert with_gradient == declared and all(".lora_" in name for name in declared)


def test_adding_lora_does_not_change_what_else_is_trainable(small_run):
    model, _ = build()
    set_trainable(model, TrainableSection(perceiver=False))
    before = set(trainable_parameters(model))
    add_lora(model, LoraSection(language=LoraPart(r=2)))
    assert {name for name in trainable_parameters(model) if ".lora_" not in name} == before
    assert copy.deepcopy(model).peft_config.keys() == {"default"}
