"""A quantized tower has every matrix of its blocks in 8 or 4 bits, and nearly the same tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.transformer import Attention
from PIL import Image
from torch import nn

from flamingo_ft.backbones.attention import restore_fused_attention
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.quantization import (
    Quantization,
    dequantize_linears,
    is_quantized,
    quantization_formats,
)
from flamingo_ft.backbones.tower import build_visual, image_transform, quantize_tower
from flamingo_ft.backbones.vision import VisionBackbone, load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.errors import UserError
from tests.backbones.test_vision import CLIP_CFG, TEXT_CFG, TOWERS, checkpoint, timm_config, write_folder
from tests.thinned import slow_except

PICTURES = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
FORMATS = ("int8", "nf4", "fp4")
SIGLIP = timm_config("test_vit3", 160, timm_pool="map", timm_proj="")
FAMILIES = {
    **{name: TOWERS[name][0] for name in ("clip", "coca", "vit", "vit-registers", "eva-rotary", "convnext")},
    "custom": {"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "block_type": "custom"}},
    "siglip": SIGLIP,
}
MINIMUM_SIMILARITY = {"int8": 0.999, "nf4": 0.98, "fp4": 0.97}


def random_tower(config: dict) -> nn.Module:
    """Return a tower in which every block has an effect: layer scales, near zero at first, are set to one.

    OpenCLIP initializes its own attention so large that each token attends to one other; here, to many.
    """
    torch.manual_seed(0)
    visual = build_visual(config).eval().requires_grad_(False)
    for name, parameter in visual.named_parameters():
        if name.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):
            parameter.fill_(1.0)
    for module in visual.modules():
        if isinstance(module, Attention):
            module.in_proj_weight.mul_(0.2)
    return visual


def images_for(config: dict) -> torch.Tensor:
    size = config["vision_cfg"]["image_size"]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def real_images(tower: VisionBackbone, count: int) -> torch.Tensor:
    """Return pictures of the quickstart, preprocessed for the tower."""
    transform = image_transform(tower.preprocess)
    return torch.stack([transform(Image.open(file)) for file in sorted(PICTURES.glob("*.png"))[:count]])


def quantized(visual: nn.Module, quantization_format: str) -> nn.Module:
    twin = copy.deepcopy(visual)
    quantize_tower(twin, Quantization(quantization_format), "cpu")
    return twin


def similarity(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the mean cosine similarity of tokens (N, V, D)."""
    return torch.cosine_similarity(actual, expected, dim=-1).mean().item()


def quantized_fraction(visual: nn.Module) -> float:
    """Return the fraction of the tower's weights that are in quantized matrices."""
    layers = [layer for layer in visual.modules() if is_quantized(layer)]
    stored = sum(layer.weight.numel() for layer in layers)
    original = sum(layer.in_features * layer.out_features for layer in layers)
    return original / (sum(parameter.numel() for parameter in visual.parameters()) - stored + original)


@pytest.mark.parametrize("quantization_format", slow_except(["nf4"], FORMATS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_block_is_quantized_and_tokens_stay_close(family, quantization_format):
    visual, images = random_tower(FAMILIES[family]), images_for(FAMILIES[family])
    twin = quantized(visual, quantization_format)
    blocks = twin.trunk if hasattr(twin, "trunk") else twin.transformer
    for name, module in blocks.named_modules():
        assert not isinstance(module, nn.MultiheadAttention), name
        assert is_quantized(module) or not isinstance(module, nn.Linear), name
        bare = [leaf for leaf, parameter in module.named_parameters(recurse=False) if "proj_weight" in leaf]
        assert not bare, name
    similar = similarity(spatial_tokens(twin, images), spatial_tokens(visual, images))
    assert similar >= MINIMUM_SIMILARITY[quantization_format]


@pytest.mark.parametrize("quantization_format, minimum", [("int8", 0.999), ("nf4", 0.99), ("fp4", 0.99)])
def test_the_nano_towers_tokens_stay_close_on_real_images(quantization_format, minimum):
    tower = load_vision("nano")
    images = real_images(tower, 16)
    twin = load_vision("nano", quantization=Quantization(quantization_format), device="cpu")
    assert similarity(spatial_tokens(twin.visual, images), spatial_tokens(tower.visual, images)) >= minimum


@pytest.mark.slow
@pytest.mark.parametrize("quantization_format, minimum", [("int8", 0.999), ("nf4", 0.98)])
def test_95_percent_of_vit_l_14_is_quantized_and_its_tokens_stay_close(quantization_format, minimum):
    torch.manual_seed(0)
    tower = load_vision("ViT-L-14")
    images = real_images(tower, 2)
    expected = spatial_tokens(tower.visual, images)
    quantize_tower(tower.visual, Quantization(quantization_format), "cpu")
    assert quantized_fraction(tower.visual) >= 0.95
    assert similarity(spatial_tokens(tower.visual, images), expected) >= minimum


def test_a_dequantized_tower_can_be_fused_again_and_gives_the_quantized_towers_tokens():
    visual, images = random_tower(FAMILIES["clip"]), images_for(FAMILIES["clip"])
    keys = list(visual.state_dict())
    twin = quantized(visual, "nf4")
    expected = spatial_tokens(twin, images)
    dequantize_linears(twin, torch.float32)
    restore_fused_attention(twin)
    assert list(twin.state_dict()) == keys and not quantization_formats(twin)
    torch.testing.assert_close(spatial_tokens(twin, images), expected)


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        quantize_tower(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "config", [TOWERS["resnet"][0], timm_config("test_resnet", 160)], ids=["resnet", "timm's"]
)
def test_a_tower_of_convolutions_is_refused(config):
    assert "has convolutions and no matrices" in refusal(build_visual(config), Quantization("nf4"))


def test_weights_of_an_unsupported_dtype_are_refused():
    visual = build_visual(FAMILIES["clip"]).double()
    message = refusal(visual, Quantization("int8"))
    assert "transformer.resblocks.0.attn" in message and "torch.float64" in message


# Loading


@pytest.mark.parametrize("quantization_format", slow_except(["nf4"], ["int8", "nf4"]))
@pytest.mark.parametrize(
    "name", ["clip", "clip-quickgelu", "coca", "vit", "vit-relative", "eva-rotary", "convnext"]
)
def test_loading_quantized_equals_loading_then_quantizing(name, quantization_format, tmp_path):
    config = TOWERS[name][0]
    write_folder(tmp_path, config)
    plain = load_vision(str(tmp_path))
    loaded = load_vision(str(tmp_path), quantization=Quantization(quantization_format), device="cpu")
    images = images_for(config)
    assert loaded.source == {**plain.source, "quantization": Quantization(quantization_format).record()}
    assert (loaded.config, loaded.preprocess, loaded.width) == (plain.config, plain.preprocess, plain.width)
    assert not loaded.visual.training and not any(p.requires_grad for p in loaded.visual.parameters())
    expected = quantized(plain.visual, quantization_format)
    assert torch.equal(spatial_tokens(loaded.visual, images), spatial_tokens(expected, images))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_of_any_format_and_dtype_loads_quantized(stored, new_format, tmp_path, monkeypatch):
    config = {"embed_dim": 16, "vision_cfg": CLIP_CFG}
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny", {**config, "text_cfg": TEXT_CFG})
    _, weights = checkpoint(config)
    weights = {f"module.{name}": tensor.to(stored) for name, tensor in weights.items()}
    file = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": weights}, file, _use_new_zipfile_serialization=new_format)
    plain = load_vision("tiny", str(file))
    loaded = load_vision("tiny", str(file), quantization=Quantization("nf4"), device="cpu")
    assert loaded.source["sha256"] == plain.source["sha256"] == tensors_sha256(plain.visual)
    images = images_for(config)
    assert torch.equal(
        spatial_tokens(loaded.visual, images), spatial_tokens(quantized(plain.visual, "nf4"), images)
    )


def test_a_loaded_tower_does_not_depend_on_its_file_afterwards(tmp_path):
    write_folder(tmp_path, TOWERS["clip"][0])
    loaded = load_vision(str(tmp_path), quantization=Quantization("nf4"), device="cpu")
    images = images_for(TOWERS["clip"][0])
    expected = spatial_tokens(loaded.visual, images)
    file = tmp_path / "open_clip_model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(spatial_tokens(loaded.visual, images), expected)


def test_random_weights_are_quantized_too():
    torch.manual_seed(0)
    plain = load_vision("ViT-S-32-alt")
    torch.manual_seed(0)
    loaded = load_vision("ViT-S-32-alt", quantization=Quantization("int8"), device="cpu")
    assert loaded.source["sha256"] == plain.source["sha256"]
    assert quantization_formats(loaded.visual) == {"int8"}


def test_a_file_that_does_not_fit_is_refused_with_quantization_too(tmp_path):
    write_folder(tmp_path, TOWERS["clip"][0])
    model = {"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "width": 48}, "text_cfg": TEXT_CFG}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError, match="cannot load .* check that weights and architecture") as caught:
        load_vision(str(tmp_path), quantization=Quantization("nf4"))
    assert "\n" not in str(caught.value)


def test_the_rest_of_the_tower_is_in_the_compute_dtype():
    loaded = load_vision("nano", quantization=Quantization("nf4", compute_dtype="bf16"), device="cpu")
    assert {parameter.dtype for parameter in loaded.visual.parameters()} == {torch.bfloat16, torch.uint8}
    assert spatial_tokens(loaded.visual, torch.randn(1, 3, *loaded.visual.image_size)).dtype == torch.bfloat16
