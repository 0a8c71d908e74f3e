"""Vision towers at other image sizes: tokens equal open_clip's, and every way to rebuild a tower agrees."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

from flamingo_ft import load_vision
from flamingo_ft.adapters import Adapters, load_adapter, save_adapter
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.tower import build_visual, image_transform
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import VisionSection
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.plan.meta_model import meta_vision

from ..model.nano import nano_flamingo
from ..thinned import slow_except
from .test_vision import CLIP_CFG, TOWERS, write_folder

# name: configuration, another size, tokens there
SIZED = {
    "clip": (TOWERS["clip"][0], 48, 36),
    "clip-smaller": (TOWERS["clip-quickgelu"][0], 16, 4),
    "sin-cos": ({"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "pos_embed_type": "sin_cos_2d"}}, 64, 64),
    "vit": (TOWERS["vit"][0], 192, 144),
    "vit-registers": (TOWERS["vit-registers"][0], 128, 64),
    "eva-rotary": (TOWERS["eva-rotary"][0], 140, 100),
    "convnext": (TOWERS["convnext"][0], 224, 49),
    "resnet": (TOWERS["resnet"][0], 128, 16),
}


PLAIN = ("clip", "eva-rotary", "resnet")  # position embeddings that are learned, computed, none


@pytest.fixture(params=slow_except(PLAIN, SIZED))
def sized(request, tmp_path):
    """A tower's folder, another image size, images of it, and the number of tokens there."""
    config, size, tokens = SIZED[request.param]
    write_folder(tmp_path, config)
    return str(tmp_path), size, torch.randn(2, 3, size, size), tokens


def test_another_size_gives_more_or_fewer_tokens_with_the_same_weights(sized):
    folder, size, images, tokens = sized
    native, loaded = load_vision(folder), load_vision(folder, image_size=size)
    assert spatial_tokens(loaded.visual, images).shape == (2, tokens, native.width)
    assert loaded.source == {
        **native.source,
        "image_size": size,
    }  # the hash is of the weights before resizing
    size_as_json = json.loads(json.dumps(loaded.visual.image_size))
    assert loaded.preprocess == {**native.preprocess, "size": size_as_json}


# Without the ResNet: open_clip does not resize its pooling.
@pytest.mark.parametrize("name", slow_except(PLAIN, [name for name in SIZED if name != "resnet"]))
def test_tokens_at_another_size_equal_open_clips(name, tmp_path):
    config, size, _ = SIZED[name]
    write_folder(tmp_path, config)
    images = torch.randn(2, 3, size, size)
    peer = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).visual.eval()
    ours = load_vision(str(tmp_path), image_size=size).visual
    torch.testing.assert_close(spatial_tokens(ours, images), spatial_tokens(peer, images))


def test_the_tower_is_rebuilt_from_its_configuration_and_state_dict(sized):
    folder, size, images, _ = sized
    loaded = load_vision(folder, image_size=size)
    rebuilt = build_visual(json.loads(json.dumps(loaded.config))).eval()
    rebuilt.load_state_dict(loaded.visual.state_dict())
    assert rebuilt.image_size == loaded.visual.image_size
    assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(loaded.visual, images))
    assert tower_config(folder, image_size=size) == loaded.config


def test_image_size_set_to_the_native_size_changes_nothing(tmp_path):
    write_folder(tmp_path, TOWERS["clip"][0])
    native, named = load_vision(str(tmp_path)), load_vision(str(tmp_path), image_size=32)
    images = torch.randn(1, 3, 32, 32)
    assert named.config == native.config and named.preprocess == native.preprocess
    assert torch.equal(spatial_tokens(named.visual, images), spatial_tokens(native.visual, images))


@pytest.mark.parametrize("name", ["clip", "vit", "eva-rotary"])
def test_a_quantized_tower_at_another_size_stays_close_to_the_unquantized_one(name, tmp_path):
    config, size, tokens = SIZED[name]
    write_folder(tmp_path, config)
    images = torch.randn(1, 3, size, size)
    plain = load_vision(str(tmp_path), image_size=size)
    quantized = load_vision(str(tmp_path), quantization=Quantization("int8"), device="cpu", image_size=size)
    assert (quantized.config, quantized.preprocess) == (plain.config, plain.preprocess)
    expected, actual = (spatial_tokens(tower.visual, images) for tower in (plain, quantized))
    assert torch.cosine_similarity(actual, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "config, size, message",
    [
        (TOWERS["clip"][0], 50, "must be a multiple of the 8-pixel patches of .*, got 50; use 48 or 56"),
        (TOWERS["vit"][0], 7, "use 16"),
        (TOWERS["vit"][0], 100, "use 96 or 112"),
        ({"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "image_size": [32, 16]}}, 48, "does not support 48"),
    ],
)
def test_an_unsupported_size_is_refused_in_one_line(config, size, message, tmp_path):
    write_folder(tmp_path, config)
    for load in (load_vision, tower_config):
        with pytest.raises(UserError, match=message) as caught:
            load(str(tmp_path), image_size=size)
        assert "\n" not in str(caught.value)


# The shape of images


def left_and_right(width: int, height: int) -> Image.Image:
    """Return a white image with a red left edge and a blue right edge, an eighth of the width each."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 8, height))
    image.paste("blue", (width - width // 8, 0, width, height))
    return image


def to_pixels(image: Image.Image, **options) -> torch.Tensor:
    preprocess = load_vision("nano", **options).preprocess
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    return image_transform(preprocess)(image) * std + mean


def test_padding_to_a_square_keeps_the_whole_image_and_cropping_does_not():
    image = left_and_right(400, 200)
    padded, cropped = to_pixels(image, resize_mode="longest"), to_pixels(image, resize_mode="shortest")
    size = padded.shape[-1]
    red, blue = (torch.tensor(color).float() for color in ((1, 0, 0), (0, 0, 1)))
    middle = size // 2
    torch.testing.assert_close(padded[:, middle, 1], red, atol=0.1, rtol=0)
    torch.testing.assert_close(padded[:, middle, -2], blue, atol=0.1, rtol=0)
    assert padded[:, : size // 4 - 1].abs().max() < 0.02 and padded[:, -(size // 4 - 1) :].abs().max() < 0.02
    assert cropped[:, middle].min() > 0.9  # white: both edges are cut off
    squashed = to_pixels(image, resize_mode="squash")
    torch.testing.assert_close(squashed[:, 1, 1], red, atol=0.1, rtol=0)


# Through an adapter and a saved model


def nano(**options):
    """Return a small Flamingo with the nano tower and open gates, and its processor."""
    return nano_flamingo({"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}, vision=options)


@pytest.fixture(scope="module")
def at_96():
    return nano(image_size=96, resize_mode="longest")


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    return model(
        **processor(images=left_and_right(300, 200), text="<image> Which digit?", return_tensors="pt")
    ).logits


def test_an_adapter_loads_its_base_at_the_size_it_was_trained_at(at_96, tmp_path):
    save_adapter(*at_96, tmp_path)
    loaded, processor = load_adapter(tmp_path)
    assert loaded.vision_encoder.image_size == (96, 96)
    preprocess = processor.image_processor.open_clip_preprocess
    assert preprocess["size"] == [96, 96] and preprocess["resize_mode"] == "longest"
    assert torch.equal(logits(loaded, processor), logits(*at_96))


def test_adapters_of_different_image_sizes_cannot_share_a_base(at_96, tmp_path):
    for name, (model, processor) in {"native": nano(), "sized": at_96}.items():
        save_adapter(model, processor, tmp_path / name)
    adapters = Adapters(tmp_path / "native")
    with pytest.raises(UserError, match="uses another image size or preprocessing; load it separately"):
        adapters.load(tmp_path / "sized", "sized")


def test_a_saved_model_is_rebuilt_at_its_size(at_96, tmp_path):
    at_96[0].save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval(), at_96[1]), logits(*at_96))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_plan_builds_the_tower_that_the_recipe_does(quantization):
    section = VisionSection(name="nano", image_size=64, resize_mode="squash", quantization=quantization)
    real = load_vision(
        "nano", image_size=64, resize_mode="squash", quantization=Quantization.of(section), device="cpu"
    )
    with torch.device("meta"):
        planned = meta_vision(tower_config("nano", None, 64), section, "cpu")
    assert planned.config == real.config
    assert all(planned.preprocess[name] == real.preprocess[name] for name in ("size", "resize_mode"))
    assert planned.visual.positional_embedding.shape == real.visual.positional_embedding.shape
