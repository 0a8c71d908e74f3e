"""Visual tokens from another layer, and joined by pixel shuffle: what they are, and that they are kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pixel_shuffle

from flamingo_ft import load_vision
from flamingo_ft.adapters import Adapters, load_adapter, save_adapter
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.backbones.visual_tokens import (
    TokenOptions,
    modules_after_tokens,
    spatial_maps,
    spatial_tokens,
    token_width,
)
from flamingo_ft.convert import export_open_flamingo
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration

from ..model.nano import nano_flamingo
from .test_vision import TOWERS, write_folder

# name: the module whose output layer -2 is, and its tokens that are not patches
SECOND_TO_LAST = {
    "clip": ("transformer.resblocks.0", 1),
    "vit": ("trunk.blocks.10", 1),
    "eva-rotary": ("trunk.blocks.10", 1),
    "convnext": ("trunk.stages.2", None),
    "resnet": ("layer3", None),
}
OTHER = TokenOptions(layer=-2, pixel_shuffle=True)


def tower(name: str, **options):
    visual = build_visual({**TOWERS[name][0], **options}).eval()
    height, width = (visual.image_size,) * 2 if isinstance(visual.image_size, int) else visual.image_size
    return visual, torch.randn(2, 3, height, width)


@pytest.mark.parametrize("name", SECOND_TO_LAST)
def test_another_layers_tokens_are_what_its_block_puts_out(name):
    layer, prefix = SECOND_TO_LAST[name]
    visual, images = tower(name)
    if name == "vit":
        layer = f"trunk.blocks.{len(visual.trunk.blocks) - 2}"
    outputs = []
    visual.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    spatial_tokens(visual, images)
    visual.token_options = TokenOptions(layer=-2)
    tokens = spatial_tokens(visual, images)
    expected = outputs[0].flatten(2).mT if prefix is None else outputs[0][:, prefix:]
    assert torch.equal(tokens, expected)
    assert token_width(visual) == tokens.shape[-1]


def test_layers_after_the_one_that_is_read_are_not_run():
    visual, images = tower("clip", layer=0)
    last = visual.transformer.resblocks[1]
    assert last in modules_after_tokens(visual)
    with torch.no_grad():
        last.mlp.c_fc.weight.fill_(torch.nan)
    assert spatial_tokens(visual, images).isfinite().all()


@pytest.mark.parametrize("name", ["clip", "vit", "resnet"])
def test_pixel_shuffle_keeps_every_value_in_a_quarter_of_the_tokens(name):
    visual, images = tower(name)
    maps, width = spatial_maps(visual, images), token_width(visual)
    visual.token_options = TokenOptions(pixel_shuffle=True)
    joined = spatial_maps(visual, images)
    assert joined.shape == (2, 4 * width, maps.shape[2] // 2, maps.shape[3] // 2)
    assert token_width(visual) == 4 * width
    assert torch.equal(pixel_shuffle(joined, 2), maps)  # torch's inverse
    block = maps[0, :, -2:, :2].flatten()  # four neighbours become one token
    assert torch.equal(joined[0, :, -1, 0].sort().values, block.sort().values)


WRONG = {
    "a layer too deep": ("clip", {"layer": -3}, r"has 2 layers, got layer -3; use -2 to -1, .* or 0 to 1"),
    "a layer too high": ("resnet", {"layer": 5}, "has 5 layers, got layer 5"),
    "an odd grid": ("convnext", {"pixel_shuffle": True}, r"5 x 5; set image_size so that both are even"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tokens_that_a_tower_cannot_give_are_refused_in_one_line(wrong, tmp_path):
    name, options, message = WRONG[wrong]
    write_folder(tmp_path, TOWERS[name][0])
    for load in (load_vision, tower_config):
        with pytest.raises(UserError, match=message) as caught:
            load(str(tmp_path), tokens=TokenOptions(**options))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_tower_loads_with_the_same_tokens_however_it_is_rebuilt(quantization, tmp_path):
    write_folder(tmp_path, TOWERS["clip"][0])
    quantization = quantization and Quantization(quantization)
    loaded = load_vision(str(tmp_path), tokens=OTHER, quantization=quantization, device="cpu")
    assert loaded.config == tower_config(str(tmp_path), tokens=OTHER)
    assert loaded.width == 4 * 32 and TokenOptions.of(loaded.source) == OTHER
    plain = load_vision(str(tmp_path))
    assert plain.config == TOWERS["clip"][0] | {"quick_gelu": False}  # as before there were options
    if quantization is None:
        rebuilt = build_visual(loaded.config).eval()
        rebuilt.load_state_dict(loaded.visual.state_dict())
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(loaded.visual, images))


# Through an adapter and a saved model


def nano(tokens: TokenOptions):
    return nano_flamingo({"depth": 0}, vision={"image_size": 64, "tokens": tokens})


@pytest.fixture(scope="module")
def other():
    return nano(OTHER)


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    images = torch.arange(3 * 64 * 64, dtype=torch.uint8).view(3, 64, 64)
    return model(**processor(images=images, text="<image> Which digit?", return_tensors="pt")).logits


def test_an_adapter_loads_its_base_with_the_tokens_it_was_trained_on(other, tmp_path):
    save_adapter(*other, tmp_path)
    loaded, processor = load_adapter(tmp_path)
    assert torch.equal(logits(loaded, processor), logits(*other))
    loaded.vision_encoder.token_options = TokenOptions(layer=-1, pixel_shuffle=True)
    assert not torch.equal(logits(loaded, processor), logits(*other))


def test_a_saved_model_is_rebuilt_with_its_tokens(other, tmp_path):
    other[0].save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval(), other[1]), logits(*other))


def test_adapters_on_other_tokens_cannot_share_a_base(other, tmp_path):
    save_adapter(*nano(TokenOptions(pixel_shuffle=True)), tmp_path / "last")
    save_adapter(*other, tmp_path / "second to last")
    with pytest.raises(UserError, match="reads other visual tokens of the tower; load it separately"):
        Adapters(tmp_path / "last").load(tmp_path / "second to last", "other")


def test_open_flamingo_cannot_read_other_tokens(other, tmp_path):
    save_adapter(*other, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"model\.vision\.layer -2, model\.vision\.pixel_shuffle True"):
        export_open_flamingo(tmp_path / "adapter", tmp_path / "checkpoint.pt")
