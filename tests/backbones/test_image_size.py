"""Towers at other image sizes: the tokens are those open_clip gives at that size, wherever the tower is built."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

from flamingo_ft import build_flamingo, load_language, load_vision
from flamingo_ft.adapters import load_adapter, prepare_training, save_adapter
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.vision import build_visual, image_transform, spatial_tokens, tower_config
from flamingo_ft.config import TrainableSection
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration

from .test_vision import CLIP_CFG, TOWERS, timm_config, write_folder

# name: configuration, another size, tokens there
SIZED = {
    "clip": (TOWERS["clip"][0], 48, 36),
    "clip-smaller": (TOWERS["clip-quickgelu"][0], 16, 4),
    "sin-cos": ({"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "pos_embed_type": "sin_cos_2d"}}, 64, 64),
    "vit": (TOWERS["vit"][0], 192, 144),
    "vit-registers": (TOWERS["vit-registers"][0], 128, 64),
    "eva-rotary": (TOWERS["eva-rotary"][0], 140, 100),
    "swin": (timm_config("test_swin", 160), 192, 36) if False else (TOWERS["convnext"][0], 224, 49),
    "resnet": (TOWERS["resnet"][0], 128, 16),
}


@pytest.fixture(params=SIZED)
def sized(request, tmp_path):
    """A tower's folder, another image size, images of it, and the number of tokens there."""
    config, size, tokens = SIZED[request.param]
    write_folder(tmp_path, config)
    return str(tmp_path), size, torch.randn(2, 3, size, size), tokens


def test_another_size_gives_its_number_of_tokens_from_the_same_weights(sized):
    folder, size, images, tokens = sized
    native, loaded = load_vision(folder), load_vision(folder, image_size=size)
    assert spatial_tokens(loaded.visual, images).shape == (2, tokens, native.width)
    assert loaded.source == {**native.source, "image_size": size}  # the digest is of the weights, as they were found
    assert loaded.preprocess == {**native.preprocess, "size": json.loads(json.dumps(loaded.visual.image_size))}


def test_tokens_at_another_size_are_open_clips(sized):
    folder, size, images, _ = sized
    if "layers" in json.loads(open(f"{folder}/open_clip_config.json").read())["model_cfg"]["vision_cfg"]:
        pytest.importorskip("open_clip")
    try:
        peer = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).visual.eval()
    except RuntimeError:
        pytest.skip("open_clip cannot bring a ResNet's pooling to another size")
    torch.testing.assert_close(spatial_tokens(load_vision(folder, image_size=size).visual, images), spatial_tokens(peer, images))


def test_the_tower_is_rebuilt_from_its_configuration_and_state_dict(sized):
    folder, size, images, _ = sized
    loaded = load_vision(folder, image_size=size)
    rebuilt = build_visual(json.loads(json.dumps(loaded.config))).eval()
    rebuilt.load_state_dict(loaded.visual.state_dict())
    assert rebuilt.image_size == loaded.visual.image_size
    assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(loaded.visual, images))
    assert tower_config(folder, image_size=size) == loaded.config


def test_the_native_size_leaves_everything_as_it_is(tmp_path):
    write_folder(tmp_path, TOWERS["clip"][0])
    native, named = load_vision(str(tmp_path)), load_vision(str(tmp_path), image_size=32)
    images = torch.randn(1, 3, 32, 32)
    assert named.config == native.config and named.preprocess == native.preprocess
    assert torch.equal(spatial_tokens(named.visual, images), spatial_tokens(native.visual, images))


@pytest.mark.parametrize("name", ["clip", "vit", "eva-rotary"])
def test_a_quantized_tower_at_another_size_stays_near_the_unquantized_one(name, tmp_path):
    config, size, tokens = SIZED[name]
    write_folder(tmp_path, config)
    images = torch.randn(1, 3, size, size)
    plain = load_vision(str(tmp_path), image_size=size)
    found = load_vision(str(tmp_path), quantization=Quantization("int8"), device="cpu", image_size=size)
    assert (found.config, found.preprocess) == (plain.config, plain.preprocess)
    wanted, tokens_found = spatial_tokens(plain.visual, images), spatial_tokens(found.visual, images)
    assert torch.nn.functional.cosine_similarity(wanted, tokens_found, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "config, size, message",
    [
        (TOWERS["clip"][0], 50, "wants a multiple of its patches' 8 pixels; use 48 or 56"),
        (TOWERS["vit"][0], 7, "use 16"),
        (timm_config("test_vit4", 160), 100, "use 96 or 112") if False else (TOWERS["vit"][0], 100, "use 96 or 112"),
    ],
)
def test_a_size_that_the_tower_cannot_take_is_refused_in_one_line(config, size, message, tmp_path):
    write_folder(tmp_path, config)
    for load in (load_vision, tower_config):
        with pytest.raises(UserError, match=message) as caught:
            load(str(tmp_path), image_size=size)
        assert "\n" not in str(caught.value)


# The shape of images


def left_and_right(width: int, height: int) -> Image.Image:
    """A white image with a red left edge and a blue right one, an eighth of the width each."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 8, height))
    image.paste("blue", (width - width // 8, 0, width, height))
    return image


def pixels_of(image: Image.Image, **options) -> torch.Tensor:
    preprocess = load_vision("nano", **options).preprocess
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    return image_transform(preprocess)(image) * std + mean


def test_padding_to_a_square_keeps_the_whole_image_and_cropping_does_not():
    image = left_and_right(400, 200)
    padded, cropped = pixels_of(image, resize_mode="longest"), pixels_of(image, resize_mode="shortest")
    size = padded.shape[-1]
    red, blue = (torch.tensor(color).float() for color in ((1, 0, 0), (0, 0, 1)))
    middle = size // 2
    torch.testing.assert_close(padded[:, middle, 1], red, atol=0.1, rtol=0)
    torch.testing.assert_close(padded[:, middle, -2], blue, atol=0.1, rtol=0)
    assert padded[:, : size // 4 - 1].abs().max() < 0.02 and padded[:, -(size // 4 - 1) :].abs().max() < 0.02
    assert cropped[:, middle].min() > 0.9  # white: both edges are cut off
    squashed = pixels_of(image, resize_mode="squash")
    torch.testing.assert_close(squashed[:, 1, 1], red, atol=0.1, rtol=0)


# Through an adapter and a saved model


@pytest.fixture(scope="module")
def at_48(tmp_path_factory):
    """A Flamingo around the nano tower at another size, its gates open."""
    vision = load_vision("nano", image_size=96, resize_mode="longest")
    sizes = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    return build_flamingo(vision, load_language("nano"), perceiver=sizes)
