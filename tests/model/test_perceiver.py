"""The perceiver resampler without layers: the text attends to the visual tokens themselves."""

import pytest
import torch
from torch.nn.functional import layer_norm

from flamingo_ft.adapters import load_adapter, load_trained, save_adapter, trainable_parameters
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.model.perceiver import PerceiverResampler

from ..regimes import build, inputs, logits, recipe, shake
from .tiny import MEDIA, ids, images, tiny_flamingo

WITHOUT = "model.perceiver={depth: 0, num_latents: 8}"


@pytest.mark.parametrize("frames", [1, 3])
def test_its_latents_are_the_normalized_visual_tokens_averaged_over_frames(frames):
    tokens = torch.randn(2, 4, frames, 5, 16)
    resampler = PerceiverResampler(dim=16, depth=0)
    assert [name for name, _ in resampler.named_parameters()] == ["norm.weight", "norm.bias"]
    torch.testing.assert_close(resampler(tokens), layer_norm(tokens.double().mean(2), (16,)).float())


def test_it_tells_the_positions_of_media_apart():
    tokens = torch.randn(1, 1, 1, 5, 16).expand(1, 2, 1, 5, 16)
    with_positions = PerceiverResampler(dim=16, depth=0, max_num_media=2)
    first, second = with_positions(tokens)[0]
    expected = tokens[0, :, 0] + with_positions.media_time_embs
    torch.testing.assert_close(torch.stack([first, second]), layer_norm(expected, (16,)))
    swapped = with_positions(tokens, torch.tensor([[1, 0]]))[0]
    assert torch.equal(swapped[0], second) and torch.equal(swapped[1], first)


def test_generation_from_a_cache_equals_the_whole_forward():
    model, text, pixels = tiny_flamingo(perceiver={"depth": 0}), ids("aIbIc"), images(1, 2)
    whole = model.generate(
        input_ids=text, pixel_values=pixels, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    logits_of_all = model(input_ids=whole[:, :-1], pixel_values=pixels).logits[0, text.shape[1] - 1 :]
    logits_of_all[:, MEDIA] = -torch.inf  # never generated
    assert torch.equal(whole[0, text.shape[1] :], logits_of_all.argmax(-1))


def test_its_adapter_loads_and_merges(small_run):
    model, processor = build(WITHOUT)
    shake(model)
    expected = logits(model, processor)
    save_adapter(model, processor, small_run / "adapter")
    assert torch.equal(logits(*load_adapter(small_run / "adapter")), expected)
    merge_adapter("adapter", "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(*load_trained("merged")), expected)


def test_every_parameter_gets_a_gradient_from_plain_text_too(small_run):
    model, processor = build(WITHOUT)
    text = {"input_ids": inputs(processor)["input_ids"][:, 1:4]}
    for batch in (inputs(processor), text):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.perceiver.max_num_frames=4", "model.perceiver.max_num_frames: has no effect with depth 0"),
        ("lora.perceiver={r: 2}", "lora.perceiver: with model.perceiver.depth 0 there is no matrix"),
    ],
)
def test_options_without_effect_are_refused(small_run, override, message):
    with pytest.raises(UserError, match=message):
        recipe(WITHOUT, "trainable.perceiver=false", override)
