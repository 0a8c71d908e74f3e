"""Unfused attention: the same tower, with every matrix in a linear layer that is called."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import Attention
from peft import LoraConfig, inject_adapter_in_model
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import nn

from flamingo_ft.backbones.attention import is_unfused, restore_fused_attention, unfuse_attention
from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.errors import UserError
from tests.backbones.test_vision import CLIP_CFG, TOWERS

VARIANTS = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
UNFUSABLE = {
    **{name: TOWERS[name][0] for name in ("clip", "clip-quickgelu", "coca", "eva-rotary")},
    "custom": {"embed_dim": 16, "vision_cfg": {**CLIP_CFG, **VARIANTS}},
    "custom-plain": {"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "block_type": "custom"}},
}
QUERIES, KEYS, WIDTH, HEADS = 5, 7, 32, 4


def random_tower(config: dict) -> tuple[nn.Module, torch.Tensor]:
    """Return a tower in float64 with noise on every parameter, and two images."""
    torch.manual_seed(0)
    visual = build_visual(config).double().eval()
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = config["vision_cfg"]["image_size"]
    return visual, torch.randn(2, 3, size, size, dtype=torch.float64)


def linears(visual: nn.Module) -> list[str]:
    return [name for name, module in visual.named_modules() if isinstance(module, nn.Linear)]


@pytest.fixture(params=UNFUSABLE)
def tower(request) -> tuple[nn.Module, torch.Tensor]:
    return random_tower(UNFUSABLE[request.param])


def test_an_unfused_tower_gives_the_same_tokens(tower):
    visual, images = tower
    expected = spatial_tokens(visual, images)
    unfuse_attention(visual)
    torch.testing.assert_close(spatial_tokens(visual, images), expected, rtol=1e-10, atol=1e-10)


def test_restore_fused_attention_inverts_unfuse_attention(tower):
    visual, images = tower
    before, tokens = dict(visual.state_dict()), spatial_tokens(visual, images)
    trainable = {name: parameter.requires_grad for name, parameter in visual.named_parameters()}
    unfuse_attention(visual)
    restore_fused_attention(visual)
    after = visual.state_dict()
    assert list(after) == list(before) and not is_unfused(visual)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: parameter.requires_grad for name, parameter in visual.named_parameters()} == trainable
    assert torch.equal(spatial_tokens(visual, images), tokens)


def test_unfusing_copies_nothing_and_is_idempotent():
    visual, _ = random_tower(UNFUSABLE["clip"])
    before = {parameter.data_ptr() for parameter in visual.parameters()}
    unfuse_attention(visual)
    names = list(visual.state_dict())
    unfuse_attention(visual)
    assert {parameter.data_ptr() for parameter in visual.parameters()} == before
    assert list(visual.state_dict()) == names and is_unfused(visual)


def test_every_matrix_of_an_unfused_tower_is_used_by_calling_its_module(tower):
    visual, images = tower
    unfuse_attention(visual)
    blocks = getattr(visual, "trunk", None) or visual.transformer
    called = set()
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    spatial_tokens(visual, images)
    assert called == set(linears(blocks))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("bias", [True, False])
def test_unfused_attention_equals_torchs_multihead_attention(batch_first, mask, bias):
    torch.manual_seed(0)
    holder = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first)}
    ).double()
    shape = (lambda length: (2, length, WIDTH)) if batch_first else (lambda length: (length, 2, WIDTH))
    query, key = (torch.randn(shape(length), dtype=torch.float64) for length in (QUERIES, KEYS))
    masks = {
        "bool": torch.rand(QUERIES, KEYS) > 0.8,
        "float": torch.randn(QUERIES, KEYS, dtype=torch.float64),
        "per head": torch.randn(2 * HEADS, QUERIES, KEYS, dtype=torch.float64),
    }
    options = {"need_weights": False, "attn_mask": masks.get(mask)}
    expected, _ = holder["attn"](query, key, key, **options)
    unfuse_attention(holder)
    actual, weights = holder["attn"](query, key, key, **options)
    torch.testing.assert_close(actual, expected)
    assert weights is None


@pytest.mark.parametrize("mask", ["bool", "float", "per head"])
def test_unfused_open_clip_attention_equals_open_clips_with_a_mask(mask):
    torch.manual_seed(0)
    options = {"qk_norm": True, "scale_heads": True, "inner_norm": True, "norm_layer": nn.LayerNorm}
    holder = nn.ModuleDict({"attn": Attention(WIDTH, HEADS, **options)}).double()
    x = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    masks = {
        "bool": torch.rand(QUERIES, QUERIES) > 0.8,
        "float": torch.randn(QUERIES, QUERIES, dtype=torch.float64),
        "per head": torch.randn(2 * HEADS, QUERIES, QUERIES, dtype=torch.float64),
    }
    expected = holder["attn"].eval()(x, attn_mask=masks[mask])
    unfuse_attention(holder)
    torch.testing.assert_close(holder["attn"](x, attn_mask=masks[mask]), expected)


FUSED = {
    "eva": lambda: EvaAttention(WIDTH, HEADS, qkv_fused=True, norm_layer=nn.LayerNorm),
    "beit": lambda: BeitAttention(WIDTH, HEADS, qkv_bias=True),
    "swin v2": lambda: WindowAttention(WIDTH, (2, 2), HEADS),
}


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_timms_fused_attention_calls_its_layer_once_unfused(make):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"attn": make()}).double().eval()
    with torch.no_grad():
        holder["attn"].q_bias.normal_()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    expected, called = holder["attn"](x), []
    holder["attn"].qkv.register_forward_hook(lambda *args: called.append("qkv"))
    unfuse_attention(holder)
    torch.testing.assert_close(holder["attn"](x), expected)
    assert called == ["qkv"] and is_unfused(holder)
    restore_fused_attention(holder)
    assert not is_unfused(holder)
    assert torch.equal(holder["attn"](x), expected) and called == ["qkv"]


def test_dropout_applies_in_training_only():
    torch.manual_seed(0)
    holder = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)}
    ).train()
    unfuse_attention(holder)
    x = torch.randn(1, QUERIES, WIDTH)
    assert holder["attn"].training
    assert not torch.equal(holder["attn"](x, x, x)[0], holder["attn"](x, x, x)[0])
    holder.eval()
    assert torch.equal(holder["attn"](x, x, x)[0], holder["attn"](x, x, x)[0])


def test_lora_reaches_both_projections_of_an_unfused_tower():
    visual, images = random_tower(UNFUSABLE["clip"])
    unfuse_attention(visual)
    expected = spatial_tokens(visual, images)
    inject_adapter_in_model(
        LoraConfig(target_modules=["in_proj", "out_proj"], init_lora_weights=False), visual
    )
    wrapped = [name for name, _ in visual.named_modules() if name.endswith("lora_A.default")]
    assert len(wrapped) == 2 * CLIP_CFG["layers"]
    assert not torch.allclose(spatial_tokens(visual.double(), images), expected)


def refusal(change, visual: nn.Module) -> str:
    with pytest.raises(UserError) as caught:
        change(visual)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_attention_that_cannot_be_unfused_is_an_error_that_names_it():
    scaled = build_visual({"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "scaled_cosine_attn": True}})
    assert "transformer.resblocks.0.attn of the vision tower is OpenCLIP's scaled_cosine" in refusal(
        unfuse_attention, scaled
    )
    extra = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)})
    assert "attention attn" in refusal(unfuse_attention, extra)


def test_asking_for_attention_weights_is_an_error():
    holder = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    unfuse_attention(holder)
    x = torch.randn(1, QUERIES, WIDTH)
    assert "not available from this vision tower" in refusal(
        lambda holder: holder["attn"](x, x, x, need_weights=True), holder
    )


def test_a_tower_with_an_adapter_cannot_be_fused_again():
    visual, _ = random_tower(UNFUSABLE["clip"])
    unfuse_attention(visual)
    inject_adapter_in_model(LoraConfig(target_modules=["in_proj"]), visual)
    assert "resblocks.0.attn.in_proj is a peft.tuners.lora.layer.Linear, not a plain" in refusal(
        restore_fused_attention, visual
    )
