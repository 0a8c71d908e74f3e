"""The model's media input: pixels or the tower's tokens, media with several frames, repeated images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from flamingo_ft.adapters.lora import add_lora
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import LoraPart, LoraSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.media import find_copies, media_input

from .tiny import ids, images, tiny_flamingo

TEXT = ids("aIbIc", "dIefg")


@pytest.fixture(scope="module")
def model():
    return tiny_flamingo(perceiver={"max_num_frames": 3, "max_num_media": 2})


@pytest.fixture
def seen(model):
    """The number of images in each call of the tower."""
    counts: list[int] = []
    hook = model.vision_encoder.conv1.register_forward_pre_hook(
        lambda module, args: counts.append(len(args[0]))
    )
    yield counts
    hook.remove()


def tokens_of(model, pixels: Tensor) -> Tensor:
    """(B, M, F, C, H, W) -> (B, M, F, V, D)."""
    return spatial_tokens(model.vision_encoder, pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])


# Tokens in place of pixels


def test_vision_tokens_replace_the_pixels_without_running_the_tower(model, seen):
    pixels = images(2, 2, 3)
    tokens = tokens_of(model, pixels)
    expected = model(TEXT, pixels).logits
    before = len(seen)
    torch.testing.assert_close(model(TEXT, vision_tokens=tokens).logits, expected)
    torch.testing.assert_close(model.backbone(TEXT, vision_tokens=tokens)[0], model.backbone(TEXT, pixels)[0])
    assert len(seen) == before + 1


def test_pixels_and_tokens_together_are_refused(model):
    with pytest.raises(UserError, match="got both pixel_values and vision_tokens"):
        model(TEXT, images(2, 2), vision_tokens=torch.zeros(2, 2, 1, 4, 32))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"vision_tokens": torch.zeros(2, 2, 4, 32)}, r"vision_tokens: .* got shape \(2, 2, 4, 32\)"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, r"pixel_values: .* got shape \(2, 3, 16, 16\)"),
        (
            {"pixel_values": images(2, 2), "frame_counts": torch.ones(2)},
            r"frame_counts: must have shape \(2, 2\), got \(2,\)",
        ),
        (
            {"pixel_values": images(2, 2, 3), "frame_counts": torch.tensor([[1, 4], [1, 0]])},
            "frame_counts: must be 1 to 3, got 4",
        ),
        (
            {"pixel_values": images(2, 2, 3), "frame_counts": torch.tensor([[1, 0], [1, 0]])},
            "frame_counts: must be 1 to 3, got 0",
        ),
    ],
)
def test_wrong_shapes_and_frame_counts_are_refused(model, inputs, message):
    with pytest.raises(UserError, match=message):
        model(TEXT, **inputs)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_and_frame_counts_reach_the_model_under_trls_fused_head(fused):
    model = tiny_flamingo(perceiver={"max_num_frames": 3})
    pixels, frames = images(2, 2, 3), torch.tensor([[3, 1], [2, 0]])
    labels = TEXT.clone()
    plain = model(TEXT, pixels, labels=labels, frame_counts=frames).loss
    add_fused_lm_head(model)
    options = {"fused_lm_head": fused, "labels": labels, "frame_counts": frames}
    for media in ({"pixel_values": pixels}, {"vision_tokens": tokens_of(model, pixels)}):
        torch.testing.assert_close(model(input_ids=TEXT, **media, **options).loss, plain)


# Media with different numbers of frames


def latents(model, text: Tensor, **inputs) -> Tensor:
    with torch.no_grad():
        return model.media_for(text, media_input(**inputs)).latents


def test_an_image_among_videos_has_exactly_the_latents_it_has_alone():
    model = tiny_flamingo(perceiver={"max_num_frames": 3})
    tokens = tokens_of(model, images(2, 2, 3))
    frames = torch.tensor([[3, 1], [3, 0]])
    mixed = latents(model, TEXT, pixel_values=None, vision_tokens=tokens, frame_counts=frames)
    alone = latents(model, ids("aI"), pixel_values=None, vision_tokens=tokens[:1, 1:, :1])
    assert torch.equal(mixed[0, 1], alone[0, 0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(0, 99))
def test_padding_frames_change_nothing_and_never_reach_the_tower(model, lengths, seed):
    frames = torch.tensor(lengths).view(2, 2)
    pixels, text = images(2, 2, 3, seed=seed), ids("aIbIc", "dIeIg")
    counts = []
    hook = model.vision_encoder.conv1.register_forward_pre_hook(
        lambda module, args: counts.append(len(args[0]))
    )
    actual = latents(model, text, pixel_values=pixels, frame_counts=frames)
    hook.remove()
    assert counts == [sum(lengths)]
    spoilt = pixels.clone()
    spoilt[torch.arange(3) >= frames[..., None]] = torch.nan
    assert torch.equal(actual, latents(model, text, pixel_values=spoilt, frame_counts=frames))
    for row in range(2):
        for slot in range(2):
            video = pixels[row : row + 1, : slot + 1, : lengths[2 * row + slot]]
            alone = latents(model, ids("I" * (slot + 1)), pixel_values=video)
            torch.testing.assert_close(actual[row, slot], alone[0, slot])


# The same image twice


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([torch.float32, torch.bfloat16]))
def test_exactly_the_copies_are_detected_in_any_order(names, dtype):
    kinds = images(2).to(dtype)
    # The flipped image has the same sum as the first.
    kinds = torch.stack([*kinds, kinds[0].flip(-1), kinds[0] + torch.nan])
    first, source = find_copies(kinds[names])
    assert [names[index] for index in first] == list(dict.fromkeys(names))
    assert [names[first[number]] for number in source] == names


def test_a_repeated_image_is_encoded_once_with_the_same_logits(model, seen):
    pixels = images(2, 2, 3)
    pixels[1, 0] = pixels[0, 1]
    pixels[0, 0, 2] = pixels[0, 0, 0]
    expected = model(TEXT, vision_tokens=tokens_of(model, pixels)).logits
    seen.clear()
    torch.testing.assert_close(model(TEXT, pixels).logits, expected)
    # The text mentions nine frames; one video of three is a copy, and one frame of another.
    assert seen == [5]


def test_lora_in_the_tower_learns_from_each_of_two_copies():
    gradients = []
    for copies in (False, True):
        model = tiny_flamingo()
        torch.manual_seed(0)
        add_lora(model, LoraSection(vision=LoraPart(r=2)))
        lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        for parameter in lora.values():
            torch.nn.init.normal_(parameter, std=0.1).requires_grad_(True)
        pixels = images(2, 1)
        pixels[1] = pixels[0] if copies else pixels[0] + 1e-6
        model(ids("aIb", "Icd"), pixels).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in lora.values()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-3)
