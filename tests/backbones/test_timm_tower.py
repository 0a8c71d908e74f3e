"""timm models as towers: tokens and pixels are timm's own, from a folder and from the Hub by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn

from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.quantization import Quantization, is_quantized
from flamingo_ft.backbones.timm_source import read_timm_config
from flamingo_ft.backbones.tower import (
    build_visual,
    image_transform,
    non_persistent_buffers,
    tower_preprocess,
)
from flamingo_ft.backbones.vision import load_vision, tower_config
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config.model_section import VisionSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import cast_model
from flamingo_ft.plan.meta_model import meta_vision
from tests.backbones.test_quantized_tower import MINIMUM_SIMILARITY, similarity
from tests.hub_folders import put
from tests.thinned import slow_except

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# name: (timm architecture, its arguments, image size, V, D)
MODELS: dict[str, tuple[str, dict, int, int, int]] = {
    "lite0": ("tf_efficientnet_lite0", {}, 64, 4, 320),
    "convnext": ("convnext_tiny", {"dims": [8, 16, 24, 32], "depths": [1] * 4}, 64, 4, 32),
    "dinov2": ("vit_small_patch14_dinov2", {**SMALL_VIT, "img_size": 42}, 42, 9, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, "img_size": 42}, 42, 9, 32),
    "dinov3": ("vit_small_patch16_dinov3", {**SMALL_VIT, "img_size": 48}, 48, 9, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "img_size": 56},
        56, 49, 32,
    ),
}  # fmt: skip
PREFIX_TOKENS = {"dinov2": 1, "registers": 5, "dinov3": 5}


def random_model(name: str, seed: int = 0) -> Any:
    """Return a small model with random weights and batch statistics, as timm builds it."""
    architecture, arguments, size, _, _ = MODELS[name]
    torch.manual_seed(seed)
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **arguments).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("gamma", "gamma1", "gamma2", "running_var")):  # close to 0 at first
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif key.endswith("running_mean"):
            tensor.copy_(torch.randn_like(tensor))
    return model


def write_model(folder: Path, name: str, seed: int = 0, **preprocess: Any) -> Any:
    """Save a small random model as timm does for the Hub, and return it."""
    model = random_model(name, seed)
    save_for_hf(model, folder, model_config={"pretrained_cfg": preprocess}, safe_serialization=True)
    return model


def images_of(name: str) -> torch.Tensor:
    size = MODELS[name][2]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def reference_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return timm's features of the last block, without what comes after it, as (N, V, D)."""
    model = copy.deepcopy(model)
    for after in {"norm", "conv_head", "bn2"} & dict(model.named_children()).keys():
        setattr(model, after, nn.Identity())
    features = model.forward_features(images)
    if features.ndim == 3:
        return features[:, model.num_prefix_tokens :]
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


@pytest.fixture(params=MODELS)
def saved(request, tmp_path) -> tuple[str, Any, str]:
    """Return the name of a model, the model, and the folder that it is saved in."""
    return request.param, write_model(tmp_path / "tower", request.param), str(tmp_path / "tower")


# Tokens


def test_tokens_are_timms_features_of_the_last_block(saved):
    name, model, folder = saved
    tower, images = load_vision(folder), images_of(name)
    tokens = spatial_tokens(tower.visual, images)
    assert tokens.shape == (2, *MODELS[name][3:]) and tower.width == MODELS[name][4]
    assert torch.equal(tokens, reference_tokens(model, images))
    maps = model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
    assert torch.equal(tokens, maps.flatten(2).transpose(1, 2))
    assert not tower.visual.training and not any(p.requires_grad for p in tower.visual.parameters())


def test_tokens_in_bfloat16_are_close_to_those_in_float32(saved):
    """Of a tower that is loaded so, as for training, and of one that is cast, as for answers."""
    name, model, folder = saved
    exact = reference_tokens(model, images_of(name))
    cast = load_vision(folder).visual
    cast_model(cast, torch.bfloat16)
    for visual in (load_vision(folder, dtype=torch.bfloat16).visual, cast):
        tokens = spatial_tokens(visual, images_of(name))
        assert tokens.dtype == torch.bfloat16
        assert (tokens.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name, prefix", PREFIX_TOKENS.items())
def test_class_and_register_tokens_are_not_visual_tokens(name, prefix):
    model = random_model(name)
    assert model.num_prefix_tokens == prefix
    assert model.forward_features(images_of(name)).shape[1] == MODELS[name][3] + prefix


def test_a_tower_rebuilt_from_its_configuration_gives_the_same_tokens(saved):
    name, _, folder = saved
    tower = load_vision(folder)
    config = json.loads(json.dumps(tower.config))
    assert config == tower.config
    with torch.device("meta"):
        rebuilt = build_visual(config)
    rebuilt.load_state_dict(tower.visual.state_dict(), strict=True, assign=True)
    for path, buffer in non_persistent_buffers(config).items():
        owner, _, leaf = path.rpartition(".")
        setattr(rebuilt.get_submodule(owner), leaf, buffer)
    images = images_of(name)
    assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(tower.visual, images))


@pytest.mark.slow
def test_a_rebuilt_fbnet_has_the_epsilon_that_timm_gives_its_pretrained_weights(tmp_path):
    save_for_hf(timm.create_model("fbnetc_100"), tmp_path, safe_serialization=True)
    loaded = load_vision(str(tmp_path))
    for visual in (loaded.visual, build_visual(loaded.config)):
        assert {module.eps for module in visual.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("name, size", [("lite0", 96), ("registers", 56), ("swin", 112)])
def test_a_timm_tower_takes_another_image_size(name, size, tmp_path):
    write_model(tmp_path, name)
    tower = load_vision(str(tmp_path), image_size=size)
    _, _, native, tokens, width = MODELS[name]
    images = torch.randn(1, 3, size, size)
    assert spatial_tokens(tower.visual, images).shape == (1, tokens * size**2 // native**2, width)
    assert tower.preprocess["size"] == [size, size]
    assert tower.source["sha256"] == load_vision(str(tmp_path)).source["sha256"]


def test_the_classifier_is_not_part_of_a_tower(tmp_path):
    model = write_model(tmp_path, "lite0")
    model.reset_classifier(0)
    tower = load_vision(str(tmp_path))
    assert tower.source["sha256"] == tensors_sha256(tower.visual)
    assert tensors_sha256(tower.visual.trunk) == tensors_sha256(model)


# Pixels


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_timms_evaluation_transform(crop_mode, interpolation, tmp_path):
    preprocess = {"crop_mode": crop_mode, "interpolation": interpolation, "crop_pct": 1.0}
    model = write_model(
        tmp_path, "lite0", **preprocess, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 64, 64)
    )
    values = {**model.pretrained_cfg, **json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]}
    reference: Any = create_transform(**resolve_data_config(pretrained_cfg=values))
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    pixels = image_transform(load_vision(str(tmp_path)).preprocess)(image)
    assert torch.equal(pixels, reference(image))
    assert pixels.mean() != 0 and values["mean"] == [0.1, 0.2, 0.3]


def test_crop_pct_is_ignored_so_that_nothing_is_cut_off_the_shorter_side(tmp_path):
    write_model(tmp_path, "lite0", crop_pct=0.5)
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 8, 64))
    pixels = image_transform(load_vision(str(tmp_path)).preprocess)(image)
    assert pixels[0, 32, 2] < 0 < pixels[0, 32, 32]


# The Hub


@pytest.mark.parametrize("written", ["timm/convnext_tiny", "timm/convnext_tiny.in12k_ft_in1k"])
def test_a_name_loads_its_own_weights_from_the_hub_and_records_tag_and_commit(written, hub, tmp_path):
    model = write_model(tmp_path / "tower", "convnext")
    put(hub, "timm/convnext_tiny.in12k_ft_in1k", tmp_path / "tower")
    tower = load_vision(written)
    assert torch.equal(
        spatial_tokens(tower.visual, images_of("convnext")), reference_tokens(model, images_of("convnext"))
    )
    commit = hub.repositories["timm/convnext_tiny.in12k_ft_in1k"].history[-1].oid
    assert tower.source == {
        "name": "timm/convnext_tiny.in12k_ft_in1k",
        "pretrained": None,
        "revision": commit,
        "sha256": tensors_sha256(tower.visual),
        "quantization": None,
        "image_size": None,
    }
    local = load_vision(str(tmp_path / "tower"))
    assert (local.config, local.preprocess) == (tower.config, tower.preprocess)
    assert local.source["sha256"] == tower.source["sha256"]


def test_a_revision_loads_the_weights_of_that_commit(hub, tmp_path):
    name, sources = "timm/convnext_tiny.in12k_ft_in1k", []
    for seed in range(2):
        write_model(tmp_path / str(seed), "convnext", seed)
        put(hub, name, tmp_path / str(seed))
        sources.append(load_vision(name).source)
    assert sources[0]["sha256"] != sources[1]["sha256"]
    assert load_vision(name, revision=sources[0]["revision"]).source == sources[0]


def test_the_configuration_of_a_name_needs_no_weights(hub, tmp_path):
    write_model(tmp_path / "tower", "convnext")
    put(hub, "timm/convnext_tiny.in12k_ft_in1k", tmp_path / "tower")
    config = tower_config("timm/convnext_tiny")
    assert not [request for request in hub.requests if "safetensors" in request]
    assert config == load_vision("timm/convnext_tiny").config


def test_a_folder_called_timm_does_not_change_what_a_name_means(hub, tmp_path, monkeypatch):
    write_model(tmp_path / "timm" / "convnext_tiny", "lite0")
    write_model(tmp_path / "tower", "convnext")
    put(hub, "timm/convnext_tiny.in12k_ft_in1k", tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    assert load_vision("timm/convnext_tiny").width == 32
    assert load_vision("./timm/convnext_tiny").width == 320


def test_a_missing_repository_is_one_line(hub):
    with pytest.raises(
        UserError, match=r"config.json of vision tower timm/convnext_tiny.in12k_ft_in1k .*: "
    ) as caught:
        load_vision("timm/convnext_tiny")
    assert "\n" not in str(caught.value)


# Quantization and plan


@pytest.mark.parametrize("quantization_format", ["int8", "nf4"])
@pytest.mark.parametrize(
    "name", slow_except(["dinov3", "swin"], [name for name in MODELS if name != "lite0"])
)
def test_a_quantized_tower_keeps_its_convolutions_and_nearly_its_tokens(name, quantization_format, tmp_path):
    model = write_model(tmp_path, name)
    tower = load_vision(str(tmp_path), quantization=Quantization(quantization_format), device="cpu")
    linears = [module for module in tower.visual.modules() if isinstance(module, nn.Linear)]
    assert linears and all(map(is_quantized, linears))
    convolutions = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convolutions
    for path in convolutions:
        assert torch.equal(tower.visual.trunk.get_submodule(path).weight, model.get_submodule(path).weight)
    images = images_of(name)
    tokens = spatial_tokens(tower.visual, images)
    assert similarity(tokens, reference_tokens(model, images)) >= MINIMUM_SIMILARITY[quantization_format]
    assert tower.source["sha256"] == load_vision(str(tmp_path)).source["sha256"]


def test_a_timm_tower_of_convolutions_cannot_be_quantized(tmp_path):
    write_model(tmp_path, "lite0")
    with pytest.raises(UserError, match="EfficientNet has convolutions and no matrices"):
        load_vision(str(tmp_path), quantization=Quantization("nf4"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_plan_builds_the_timm_tower_that_is_loaded(quantization, tmp_path):
    write_model(tmp_path, "dinov3")
    section = VisionSection(name=str(tmp_path), quantization=quantization)
    tower = load_vision(str(tmp_path), quantization=Quantization.of(section), device="cpu")
    with torch.device("meta"):
        planned = meta_vision(tower_config(str(tmp_path)), section, "cpu")
    shapes = {key: (value.shape, value.dtype) for key, value in planned.visual.named_parameters()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in tower.visual.named_parameters()}
    assert (planned.config, planned.width) == (tower.config, tower.width)


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("timm/resnet5",), "timm/resnet5: timm has no model resnet5; nearest known: timm/resnet50"),
        (("timm/vit_base_patch16_224_in21k",), "nearest known: timm/vit_base_patch16_224.augreg_in21k"),
        (("timm/tf_efficientnet_lite0.in22k",), "with tag in22k; tags of tf_efficientnet_lite0: in1k"),
        (("timm/darknet17",), "timm/darknet17 has no pretrained weights in timm; nearest known: "),
        (("timm/gcvit_base",), "timm's weights are not on the Hub"),
        (("timm/",), "timm has no model"),
        (("timm/resnet50", "a1_in1k"), "got timm/resnet50; write timm/NAME.TAG"),
        (("tf_efficientnet_lite0",), "nearest known: timm/tf_efficientnet_lite0"),
    ],
)  # fmt: skip
def test_wrong_names_are_one_line(arguments, message):
    for load in (load_vision, tower_config):
        with pytest.raises(UserError) as caught:
            load(*arguments)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def break_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= values.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"architecture": "convnext_abc"}, "has no architecture convnext_abc"),
        ({"model_args": {}}, "cannot load"),
        ({"pretrained_cfg": {"crop_mode": "round"}}, "config.json is not a timm configuration"),
        ({"pretrained_cfg": {"size": 3}}, "config.json is not a timm configuration"),
        ({"model_args": {"in_chans": 1}}, "takes images of 1 channels"),
    ],
)
def test_a_wrong_folder_is_one_line(values, message, tmp_path):
    write_model(tmp_path, "convnext")
    break_config(tmp_path, **values)
    with pytest.raises(UserError, match=message) as caught:
        load_vision(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_of_a_language_model_is_no_tower(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="config.json is not a timm configuration"):
        load_vision(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    write_model(tmp_path, "convnext")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights; add model.safetensors"):
        load_vision(str(tmp_path))


def test_padding_is_the_resize_mode_of_timms_border(tmp_path):
    write_model(tmp_path, "convnext", crop_mode="border")
    config, preprocess = read_timm_config(tmp_path / "config.json")
    assert tower_preprocess(build_visual(config), preprocess)["resize_mode"] == "longest"
